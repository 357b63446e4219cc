"""What the tests of many rooms share: a cluster's view without a network, waiting, free ports."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sollold.cluster.gossip.record import Record
from sollold.cluster.gossip.term import Term


def record(node: str, **changes: Any) -> Record:
    """A node's record with the usual ports."""
    return replace(Record(node, f"name-{node}", 1, ("127.0.0.1",), 11435, 11436, "0"), **changes)


class World:
    """All nodes' records, shared: gossip without delay. ``dead``: nodes that the others hold dead."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        self.dead: set[str] = set()
        self.callbacks: list[Callable[[], None]] = []
        self.leader: Term | None = None
        """None: each node holds itself the leader."""

    def changed(self) -> None:
        """Tell everybody who subscribed to a view of this world."""
        for callback in tuple(self.callbacks):
            callback()


class FakeView:
    """One node's view of a world; of one of its own unless ``world`` is given."""

    def __init__(self, me: Record, world: World | None = None) -> None:
        self.world = World() if world is None else world
        self._node = me.node
        self.world.records[me.node] = me

    @property
    def me(self) -> Record:
        """This node's own record."""
        return self.world.records[self._node]

    @property
    def others(self) -> dict[str, Record]:
        """The records of the other nodes that are alive."""
        return {one.node: one for one in self.live() if one.node != self._node}

    @others.setter
    def others(self, records: dict[str, Record]) -> None:
        """Exactly these are alive besides this node. The callbacks are not called: see `tell`."""
        self.world.records |= records
        self.world.dead = set(self.world.records) - set(records) - {self._node}

    def live(self) -> tuple[Record, ...]:
        """The records of all nodes alive, by id."""
        return tuple(one for node, one in sorted(self.world.records.items()) if node not in self.world.dead)

    def record(self, node: str) -> Record | None:
        """The last record of a node, alive or dead."""
        return self.world.records.get(node)

    def leader(self) -> Term:
        """The leadership that this node holds to be in force."""
        return self.world.leader or Term(1, self._node)

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call ``callback`` after each change; the answer ends that."""
        self.world.callbacks.append(callback)
        return lambda: self.world.callbacks.remove(callback)

    def update_me(self, **changes: Any) -> None:
        """Change this node's record; the callbacks are called if that changes anything."""
        fresh = replace(self.me, **changes)
        if fresh != self.me:
            self.world.records[self._node] = replace(fresh, version=self.me.version + 1)
            self.tell()

    def tell(self) -> None:
        """Call the callbacks."""
        self.world.changed()


async def until(
    condition: Callable[[], object],
    seconds: float = 15.0,
    story: Callable[[], str] = lambda: "it never came true",
) -> float:
    """Wait for a condition on this loop. Returns how many seconds it took.

    Raises:
        AssertionError: it did not come true within ``seconds``; with the text of ``story``.
    """
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"after {seconds:g} s: {story()}"
        await asyncio.sleep(0.005)
    return time.monotonic() - began


def free_ports(count: int) -> list[int]:
    """Different ports of the loopback that are free at this moment."""
    taken = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(one.getsockname()[1]) for one in taken]
    for one in taken:
        one.close()
    return ports


def free_port() -> int:
    """A port of the loopback that is free at this moment."""
    return free_ports(1)[0]
