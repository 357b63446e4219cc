"""Logarithms of the probability zero, as of a token that the caller has forbidden. Pure.

llama.cpp gives the lowest number that a float can hold. Clients of OpenAI know another.
"""

from __future__ import annotations

import re

IMPOSSIBLE = -9999.0
"""What OpenAI documents for a token that is not among the most likely ones."""
_LOWEST = re.compile(rb'("logprob"\s*:\s*)-\d+(?:\.\d+)?[eE]\+?\d+')
"""One that is written with a power of ten. In a text its quotes would be escaped."""


def shown_logprob(logprob: float) -> float:
    """A logarithm as clients know it."""
    return max(logprob, IMPOSSIBLE)


def with_shown_logprobs(raw: bytes) -> bytes:
    """The same of all in an engine's event or whole answer, which is not read for it."""
    if b'"logprob"' not in raw:
        return raw
    return _LOWEST.sub(rb"\g<1>%.1f" % IMPOSSIBLE, raw)
