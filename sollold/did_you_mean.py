"""A suggestion for a misspelt word."""

from __future__ import annotations

from collections.abc import Iterable

_MAX_CHARACTERS = 200
"""Maximum length of a word to compare: a caller's may have millions of characters."""


def did_you_mean(word: str, known: Iterable[str], alike: float = 0.6) -> str:
    """Return ``; did you mean X?`` to append to an error message, or an empty string when nothing is close.

    ``alike``: minimum similarity from 0 to 1, as computed by `difflib`.
    """
    import difflib  # rarely needed; keeps an idle daemon small

    if len(word) > _MAX_CHARACTERS:
        return ""
    matches = difflib.get_close_matches(word, list(known), 1, alike)
    return f"; did you mean {matches[0]}?" if matches else ""
