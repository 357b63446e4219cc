"""The possible decisions on a request for a model, besides those in `sollold.leader.existing`."""

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
    """Carry out ``plan`` after ending ``evictions``, given as (node, deployment, model)."""

    plan: Plan
    evictions: tuple[tuple[str, str, str], ...]
    choice: PlacementChoice
    fleet: Fleet
    pinned: bool = False
    """Whether it replaces a deployment that a caller asked to keep loaded."""
    beside: bool = False
    """Whether another deployment of the model has too little context, and may be idle in a moment."""


@dataclass(frozen=True, slots=True)
class PlaceLater:
    """``place`` is possible once memory has been released, or nodes that have just gone are back."""

    place: Place
    message: str


@dataclass(frozen=True, slots=True)
class HoldersAway:
    """The nodes with the model's files have just gone offline and should be back; nothing is decided yet."""

    message: str


@dataclass(frozen=True, slots=True)
class FetchFirst:
    """``place`` is possible, and worthwhile, once its head has fetched the file."""

    place: Place
    model: str
    digest: str
    message: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """The request can't be served. ``shortfall``: how much memory is missing, if that is why.

    ``compute_shortfall``: computes ``shortfall``. It takes longer than the decision, so it is called only for
    a final refusal.
    """

    fault: Fault
    message: str
    retry_after: float = 0.0
    shortfall: Shortfall | None = None
    alternatives: tuple[Alternative, ...] = ()
    compute_shortfall: Callable[[], Shortfall] | None = None


Decision = Use | Wait | Mismatch | ReloadWhenIdle | Place | PlaceLater | HoldersAway | FetchFirst | Refuse
