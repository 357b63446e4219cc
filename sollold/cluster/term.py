"""The order of leaders."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Term:
    """One election's claim. Totally ordered by (counter, leader): no two leaders share one."""

    counter: int = 0
    leader: str = ""
