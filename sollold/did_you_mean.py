"""A hint where a word is nearly one that is known."""

from __future__ import annotations

from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str], alike: float = 0.6) -> str:
    """``; did you mean X?``, to be put behind a fault; empty when nothing is near.

    ``alike``: the least likeness, from 0 to 1, as `difflib` counts it.
    """
    import difflib  # seldom needed, and a daemon that is idle is to be small

    near = difflib.get_close_matches(word, list(known), 1, alike)
    return f"; did you mean {near[0]}?" if near else ""
