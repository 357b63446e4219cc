"""The order of leaders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

TERM_STEP = 2**20
"""Most elections between two terms that a node sees one after the other."""
_FIRST = 2**40
"""The highest term that a node believes which has seen none yet."""


@dataclass(frozen=True, slots=True, order=True)
class Term:
    """One election's claim. Totally ordered by (counter, leader): no two leaders share one.

    Where one is read, its counter is held to what elections can reach and can be written.
    """

    counter: Annotated[int, Meta(ge=0, lt=2**62)] = 0
    leader: str = ""


def follows(term: Term, highest: Term) -> bool:
    """Whether elections can have led from ``highest`` to ``term``; where nothing was seen, many may have."""
    return term.counter <= highest.counter + TERM_STEP or (not highest.counter and term.counter <= _FIRST)
