"""What can come of a request for a model, beside what is there already (`sollold.leader.existing`)."""

from __future__ import annotations

from collections.abc import Callable

from sollold.errors import Fault
from sollold.facts import dataclass
from sollold.leader.existing import Mismatch, ReloadWhenIdle, Use, Wait
from sollold.placement.explain import Shortfall
from sollold.placement.inventory import Fleet
from sollold.placement.plan import Plan
from sollold.placement.planner import PlacementChoice
from sollold.placement.search import Alternative


@dataclass(frozen=True, slots=True)
class Place:
    """Carry ``plan`` out after ending ``evictions`` (node, deployment, model)."""

    plan: Plan
    evictions: tuple[tuple[str, str, str], ...]
    choice: PlacementChoice
    fleet: Fleet
    pinned: bool = False
    """It replaces a deployment that its caller asked to keep loaded."""
    beside: bool = False
    """Another deployment of the model has too little context, and may be idle in a moment."""


@dataclass(frozen=True, slots=True)
class PlaceLater:
    """``place`` can be done when memory that is being given back is free, or who has just gone is back."""

    place: Place
    message: str


@dataclass(frozen=True, slots=True)
class HoldersAway:
    """The nodes with the model's files have just gone offline and should be back: nothing is decided yet."""

    message: str


@dataclass(frozen=True, slots=True)
class FetchFirst:
    """``place`` can be done, and is worth it, when its head has fetched the file."""

    place: Place
    model: str
    digest: str
    message: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """It can't be answered. ``shortfall``: the arithmetic, when memory is why.

    ``reckon``: gives that, which takes longer than the decision; done only for what is refused in the end.
    """

    fault: Fault
    message: str
    retry_after: float = 0.0
    shortfall: Shortfall | None = None
    alternatives: tuple[Alternative, ...] = ()
    reckon: Callable[[], Shortfall] | None = None


Decision = Use | Wait | Mismatch | ReloadWhenIdle | Place | PlaceLater | HoldersAway | FetchFirst | Refuse
