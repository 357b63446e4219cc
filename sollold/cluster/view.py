"""The cluster as this node sees it now: the contract for every room above."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from sollold.cluster.record import Record
from sollold.cluster.term import Term


class View(Protocol):
    """Who is there and what each says of itself. Reading never waits."""

    @property
    def me(self) -> Record:
        """This node's own record, with its version and claim."""
        ...

    def live(self) -> tuple[Record, ...]:
        """Records of all nodes held alive, this one included, by node id."""
        ...

    def record(self, node: str) -> Record | None:
        """The last record of ``node``, alive or not; None when never seen."""
        ...

    def leader(self) -> Term:
        """The term that holds; ``leader`` is empty while there is none."""
        ...

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call ``callback`` on the loop after any change; the answer ends that."""
        ...

    def update_me(self, **changes: Any) -> None:
        """Replace fields of the own record, raise its version and spread it. Equal values do nothing."""
        ...
