"""Helpers for the tests of several packages: a cluster view without a network, polling, free ports."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sollold.cluster.gossip.record import Record
from sollold.cluster.gossip.term import Term
from sollold.subscribers import Subscribers


def record(node: str, **changes: Any) -> Record:
    """A node's record with the default ports; ``changes`` replaces fields."""
    return replace(Record(node, f"name-{node}", 1, ("127.0.0.1",), 11435, 11436, "0"), **changes)


class World:
    """The records of all nodes, shared by their views: gossip without delay.

    Attributes:
        dead: ids of the nodes that the others consider dead.
        leader: the current leadership; None: each node considers itself the leader.
    """

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        self.dead: set[str] = set()
        self.subscribers = Subscribers("the world")
        self.leader: Term | None = None

    def changed(self) -> None:
        """Call all callbacks subscribed to views of this world."""
        self.subscribers.notify()


class FakeView:
    """One node's view of a world; without ``world``, of a new one."""

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
        """The records of the other live nodes, by id."""
        return {record.node: record for record in self.live() if record.node != self._node}

    @others.setter
    def others(self, records: dict[str, Record]) -> None:
        """Make exactly these the other live nodes. Does not call the callbacks; see `tell`."""
        self.world.records |= records
        self.world.dead = set(self.world.records) - set(records) - {self._node}

    def live(self) -> tuple[Record, ...]:
        """The records of all live nodes, sorted by id."""
        return tuple(
            record for node, record in sorted(self.world.records.items()) if node not in self.world.dead
        )

    def record(self, node: str) -> Record | None:
        """The last record of a node, alive or dead."""
        return self.world.records.get(node)

    def leader(self) -> Term:
        """The leadership that this node considers current."""
        return self.world.leader or Term(1, self._node)

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call ``callback`` after each change. Returns a function that unsubscribes it."""
        return self.world.subscribers.add(callback)

    def update_me(self, **changes: Any) -> None:
        """Replace fields of this node's record, and call the callbacks if a value changed."""
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
    """Wait on this loop until a condition is true. Returns how many seconds it took.

    Raises:
        AssertionError: the condition was still false after ``seconds``; its text is that of ``story``.
    """
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"after {seconds:g} s: {story()}"
        await asyncio.sleep(0.005)
    return time.monotonic() - began


def free_ports(count: int) -> list[int]:
    """Distinct ports that are currently free on 127.0.0.1."""
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(server.getsockname()[1]) for server in servers]
    for server in servers:
        server.close()
    return ports


def free_port() -> int:
    """A port that is currently free on 127.0.0.1."""
    return free_ports(1)[0]
