"""Readable text for msgspec's errors about numbers out of range."""

from __future__ import annotations

import re

_BEYOND = re.compile(r"Expected `\w+` ([<>]=?) (\S+)")
_RANGES = {"<=": "at most", "<": "less than", ">=": "at least", ">": "more than"}


def out_of_range(fault: str) -> str:
    """Return ``must be at most 64`` for the error "Expected `int` <= 64"; empty for any other error."""
    beyond = _BEYOND.match(fault)
    return f"must be {_RANGES[beyond[1]]} {beyond[2]}" if beyond else ""
