"""A suggestion for a misspelt word."""

from __future__ import annotations

from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str], alike: float = 0.6) -> str:
    """Return ``; did you mean X?`` to append to an error message, or an empty string when nothing is close.

    ``alike``: minimum similarity from 0 to 1, as computed by `difflib`.
    """
    import difflib  # rarely needed; keeps an idle daemon small

    matches = difflib.get_close_matches(word, list(known), 1, alike)
    return f"; did you mean {matches[0]}?" if matches else ""
