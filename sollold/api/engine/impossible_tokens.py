"""Log-probabilities of impossible tokens, such as those that the caller has forbidden. Pure.

llama.cpp gives the lowest number that a float can hold. OpenAI's clients expect another value.
"""

from __future__ import annotations

import re

IMPOSSIBLE = -9999.0
"""OpenAI's documented value for a token that is not among the most likely ones."""
_LOWEST = re.compile(rb'("logprob"\s*:\s*)-\d+(?:\.\d+)?[eE]\+?\d+')
"""A log-probability in exponent notation. Within a JSON string, the quotes would be escaped."""


def shown_logprob(logprob: float) -> float:
    """Return a log-probability in the range that clients expect."""
    return max(logprob, IMPOSSIBLE)


def with_shown_logprobs(raw: bytes) -> bytes:
    """Apply `shown_logprob` to all of an engine's event or whole answer, without decoding it."""
    if b'"logprob"' not in raw:
        return raw
    return _LOWEST.sub(rb"\g<1>%.1f" % IMPOSSIBLE, raw)
