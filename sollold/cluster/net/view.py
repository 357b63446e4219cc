"""The cluster as this node sees it now: the contract for every room above, and how to wait for a change."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, Protocol

from sollold.cluster.gossip.record import Record
from sollold.cluster.gossip.term import Term


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


def name_of(view: View, node: str) -> str:
    """The name of a node for people; its id while it is not known."""
    record = view.record(node)
    return record.name if record is not None else node


class Observable(Protocol):
    """Something that tells of its changes; a `View` is one."""

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call ``callback`` on the loop after any change; the answer ends that."""
        ...


async def next_change(source: Observable, timeout: float) -> None:
    """Wait for the next change of ``source``, ``timeout`` seconds at most."""
    changed = asyncio.Event()
    unsubscribe = source.subscribe(changed.set)
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await changed.wait()
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
