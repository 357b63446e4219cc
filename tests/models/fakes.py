"""A cluster's view and peer calls without a network."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import msgspec

from sollold.cluster.peer import PeerError
from sollold.cluster.record import Record
from sollold.cluster.term import Term


def record(node: str, **changes: Any) -> Record:
    return replace(Record(node, f"name-{node}", 1, ("127.0.0.1",), 11435, 11436, "0"), **changes)


class FakeView:
    """One node's view; `others` are the records of the rest."""

    def __init__(self, me: Record) -> None:
        self._me = me
        self.others: dict[str, Record] = {}
        self.callbacks: list[Callable[[], None]] = []

    @property
    def me(self) -> Record:
        return self._me

    def live(self) -> tuple[Record, ...]:
        return tuple(sorted((self._me, *self.others.values()), key=lambda one: one.node))

    def record(self, node: str) -> Record | None:
        return self._me if node == self._me.node else self.others.get(node)

    def leader(self) -> Term:
        return Term(1, self._me.node)

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        self.callbacks.append(callback)
        return lambda: self.callbacks.remove(callback)

    def update_me(self, **changes: Any) -> None:
        new = replace(self._me, **changes)
        if new != self._me:
            self._me = replace(new, version=self._me.version + 1)
            self.tell()

    def tell(self) -> None:
        for callback in tuple(self.callbacks):
            callback()


class FakeServer:
    """Keeps what parts register."""

    def __init__(self) -> None:
        self.methods: dict[str, tuple[type[Any], Callable[[str, Any], Awaitable[object]]]] = {}
        self.routes: list[tuple[str, str, Any]] = []

    def method(self, name: str, request: type[Any], handler: Callable[[str, Any], Awaitable[object]]) -> None:
        self.methods[name] = (request, handler)

    def route(self, method: str, path: str, handler: Any) -> None:
        self.routes.append((method, path, handler))

    def tunnel(self, resolve: Callable[[str, str], int]) -> None:
        raise NotImplementedError


class FakeCalls:
    """Calls that reach the servers of other nodes through msgpack, as the real ones do."""

    def __init__(self, me: str, servers: dict[str, FakeServer]) -> None:
        self.me = me
        self.servers = servers
        self.cut: set[str] = set()
        self.made: list[tuple[str, str]] = []

    async def call(self, node: str, method: str, request: object, reply: type[Any], *, timeout: float) -> Any:
        self.made.append((node, method))
        await asyncio.sleep(0)
        if node in self.cut or node not in self.servers:
            raise PeerError(node, f"node {node} could not be reached", transport=True)
        kind, handler = self.servers[node].methods[method]
        asked = msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=kind)
        answer = await handler(self.me, asked)
        return msgspec.msgpack.decode(msgspec.msgpack.encode(answer), type=reply)

    def stream(self, *_: object, **__: object) -> Any:
        raise NotImplementedError


async def until(condition: Callable[[], object]) -> None:
    """Wait for a condition; fail when it does not come about."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come about")
