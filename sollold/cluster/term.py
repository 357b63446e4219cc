"""The order of leaders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta


@dataclass(frozen=True, slots=True, order=True)
class Term:
    """One election's claim. Totally ordered by (counter, leader): no two leaders share one.

    Where one is read, its counter is held to what elections can reach and can be written.
    """

    counter: Annotated[int, Meta(ge=0, lt=2**62)] = 0
    leader: str = ""
