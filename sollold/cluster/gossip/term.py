"""Terms: the total order of leaders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

TERM_STEP = 2**20
"""Maximum elections between two terms that a node sees one after the other."""
_MAX_FIRST = 2**40
"""The highest term accepted by a node that has seen none yet."""


@dataclass(frozen=True, slots=True, order=True)
class Term:
    """One election's claim. Totally ordered by (counter, leader): no two leaders share a term.

    Decoding limits the counter to values that elections can reach and that can be encoded.
    """

    counter: Annotated[int, Meta(ge=0, lt=2**62)] = 0
    leader: str = ""


def follows(term: Term, highest: Term) -> bool:
    """Whether elections can lead from ``highest`` to ``term``; if none was seen, many may have been held."""
    return term.counter <= highest.counter + TERM_STEP or (not highest.counter and term.counter <= _MAX_FIRST)
