"""How much an engine would have taken, read from its refusal of what was too long. Pure."""

from __future__ import annotations

import re

_LIMIT = re.compile(r"batch size: (\d+)|context size \((\d+)|n_ctx(?:_seq)?\D{1,4}(\d+)")
_WORDS = ("too l", "exceed", "larger than")


def longest_input(message: str) -> int | None:
    """Tokens that the engine would have taken, when ``message`` refuses a text as too long; else ``None``."""
    if not any(word in message for word in _WORDS):
        return None
    match = _LIMIT.search(message)
    if match is None:
        return None
    return int(next(group for group in match.groups() if group))
