"""What msgspec says of a number out of its bounds, in words of people."""

from __future__ import annotations

import re

_BEYOND = re.compile(r"Expected `\w+` ([<>]=?) (\S+)")
_RANGES = {"<=": "at most", "<": "less than", ">=": "at least", ">": "more than"}


def out_of_range(fault: str) -> str:
    """``must be at most 64`` for a decoder's "Expected `int` <= 64"; empty when it says something else."""
    beyond = _BEYOND.match(fault)
    return f"must be {_RANGES[beyond[1]]} {beyond[2]}" if beyond else ""
