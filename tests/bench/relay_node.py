"""A node for the relay's benchmark: `python -m tests.bench.relay_node NAME HTTP PEER OTHER ENGINE`.

The real API, serving room and peer transport; records and models are given. Node ``b`` has the endpoint,
so asking it measures one hop, asking ``a`` two.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import uvloop
from aiohttp import web

from sollold.api.app import build_app
from sollold.cluster.identity import Identity, Tokens
from sollold.cluster.peer_client import Calls
from sollold.cluster.peer_server import Peers
from sollold.cluster.reach import Reach
from sollold.cluster.record import Backend, Endpoint, Record, State
from sollold.cluster.term import Term
from sollold.config import HttpSettings, ServingSettings
from sollold.models.names import Resolved
from sollold.serving.endpoint_server import EndpointServer
from sollold.serving.loader import LeaderLoader
from sollold.serving.router import Router
from sollold.serving.service import Serving
from tests.api.api_parts import PlainCluster, model, parts

MODEL = "bench:latest"
IDS = {"a": "a" * 16, "b": "b" * 16}


class Given:
    """The view, the engines and the names, all fixed."""

    def __init__(self, name: str, engine: str) -> None:
        self._engine = engine
        self._endpoint = Endpoint(
            "d1", MODEL, "", Backend.LOCAL, State.READY, context=8192, slots=64, speed=50.0
        )
        self._records = {
            id: Record(id, one, 1, ("127.0.0.1",), 1, 1, "0", endpoints=(self._endpoint,) * (one == "b"))
            for one, id in IDS.items()
        }
        self.me = self._records[IDS[name]]

    def live(self) -> tuple[Record, ...]:
        return tuple(self._records.values())

    def record(self, node: str) -> Record | None:
        return self._records.get(node)

    def leader(self) -> Term:
        return Term(1, IDS["b"])

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        return lambda: None

    def update_me(self, **changes: Any) -> None:
        raise NotImplementedError

    def endpoint(self, endpoint: str) -> Endpoint | None:
        return self._endpoint

    def url(self, endpoint: str) -> str | None:
        return self._engine

    @contextlib.contextmanager
    def busy(self, endpoint: str, keep_alive: float | None) -> Iterator[None]:
        yield

    def fail(self, endpoint: str, reason: str) -> None:
        raise AssertionError(reason)

    def report(self, endpoint: str, active: int, waiting: int, speed: float) -> None:
        """The record stays as it is."""

    async def awaited(self, name: str) -> Resolved:
        return Resolved(name, MODEL)

    def get(self, name: str) -> None:
        return None


async def main(name: str, http: int, peer: int, other: int, engine: str) -> None:
    given = Given(name, engine)
    identity = Identity(IDS[name], Tokens.read(""))
    peers = Peers(identity)
    there = IDS["b" if name == "a" else "a"]
    reach = Reach(identity, lambda node: (("127.0.0.1", other),) if node == there else ())
    calls = Calls(reach, peers)
    settings = ServingSettings()
    server = EndpointServer(given, given, settings, peers)
    serving = Serving(
        given, given, calls, server, LeaderLoader(given, calls), Router(IDS[name]), settings, HttpSettings()
    )
    await peers.start("127.0.0.1", peer)
    await server.start()
    await serving.start()
    built = parts(serving, model(MODEL), cluster=PlainCluster(given.me))
    runner = web.AppRunner(build_app(built, HttpSettings()), access_log=None, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", http).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], *(int(word) for word in sys.argv[2:5]), sys.argv[5]))
