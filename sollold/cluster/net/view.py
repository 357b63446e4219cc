"""The cluster as this node sees it: the interface for all other packages, and waiting for changes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from sollold.cluster.gossip.record import Endpoint, Record
from sollold.cluster.gossip.term import Term
from sollold.turns import sleep_until_set


class View(Protocol):
    """The live nodes and their records. Reading never blocks."""

    @property
    def me(self) -> Record:
        """This node's own record, with its version and claim."""
        ...

    def live(self) -> tuple[Record, ...]:
        """Return the records of all nodes considered alive, including this one, by node id."""
        ...

    def record(self, node: str) -> Record | None:
        """Return the last record of ``node``, alive or not; None if never seen."""
        ...

    def leader(self) -> Term:
        """Return the current term; ``leader`` is empty while there is none."""
        ...

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call ``callback`` on the loop after any change; the returned function unsubscribes it."""
        ...

    def update_me(self, **changes: Any) -> None:
        """Replace fields of this node's record, raise its version and spread it. Equal values do nothing."""
        ...


def name_of(view: View, node: str) -> str:
    """Return a node's display name; its id while its record is unknown."""
    record = view.record(node)
    return record.name if record is not None else node


def endpoint_at(view: View, node: str, endpoint: str) -> Endpoint | None:
    """Return an endpoint according to the record of ``node``, alive or not; None if it is not there."""
    record = view.record(node)
    endpoints = record.endpoints if record is not None else ()
    return next((entry for entry in endpoints if entry.id == endpoint), None)


class Observable(Protocol):
    """Something that reports its changes; a `View` is one."""

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call ``callback`` on the loop after any change; the returned function unsubscribes it."""
        ...


async def next_change(source: Observable, timeout: float) -> None:
    """Wait for the next change of ``source``, ``timeout`` seconds at most."""
    changed = asyncio.Event()
    unsubscribe = source.subscribe(changed.set)
    try:
        await sleep_until_set(changed, timeout)
    finally:
        unsubscribe()


async def wait_until(source: Observable, condition: Callable[[], bool]) -> None:
    """Wait until ``condition`` holds; it is checked now and after each change of ``source``."""
    changed = asyncio.Event()
    unsubscribe = source.subscribe(changed.set)
    try:
        while not condition():
            changed.clear()
            await changed.wait()
    finally:
        unsubscribe()
