"""A node for the relay's benchmark: `python -m tests.bench.relay_node NAME HTTP PEER OTHER ENGINE [KEY]`.

It uses the real API, serving component and peer transport, with fixed records and models, and collects
garbage as the daemon does. Node ``b`` has the
endpoint, so requests to it measure one hop and requests to ``a`` two. KEY is a file to which it writes an API
key that other machines then need.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import uvloop

from sollold.api.http.application import Listener, build_app
from sollold.cluster.gossip.record import Backend, Endpoint, Record, State
from sollold.cluster.gossip.term import Term
from sollold.cluster.net.dialer import Dialer
from sollold.cluster.net.identity import Identity, Tokens
from sollold.cluster.net.rpc_client import RpcClient
from sollold.cluster.net.rpc_server import RpcServer
from sollold.control.keys import Keys, Scope
from sollold.engines.address import EngineAddress
from sollold.models.library import Library
from sollold.models.listing import Listed
from sollold.serving.endpoint_server import EndpointServer
from sollold.serving.engines import Engines
from sollold.serving.loader import Loader
from sollold.serving.router import Router
from sollold.serving.service import Serving
from sollold.settings.schema import HttpSettings, ServingSettings
from tests.api.api_parts import PlainCluster, model, parts
from tests.keys import key

MODEL = "bench:latest"
KEYS = {"a": key(1), "b": key(2)}
ENGINE_KEY = "k" * 43
"""A key of realistic length, which the engine double ignores."""
IDS = {name: node_key.node for name, node_key in KEYS.items()}


class FixedCluster(Engines, Library):
    """A fixed view with fixed engines and names."""

    def __init__(self, name: str, engine: str) -> None:
        self._engine = EngineAddress(engine, ENGINE_KEY)
        self._endpoint = Endpoint(
            "d1", MODEL, "", Backend.LOCAL, State.READY, context=8192, slots=64, speed=50.0
        )
        self._records = {
            id: Record(
                id, node_name, 1, ("127.0.0.1",), 1, 1, "0", endpoints=(self._endpoint,) * (node_name == "b")
            )
            for node_name, id in IDS.items()
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
        """Do nothing: the record is fixed."""

    def of(self, endpoint: str) -> FixedCluster:
        return self

    def endpoint(self, endpoint: str) -> Endpoint | None:
        return self._endpoint

    def address(self, endpoint: str) -> EngineAddress | None:
        return self._engine

    @contextlib.contextmanager
    def busy(self, endpoint: str, keep_alive: float | None) -> Iterator[None]:
        yield

    def fail(self, endpoint: str, reason: str) -> None:
        raise AssertionError(reason)

    def work(self, endpoint: str) -> None:
        """Return None: unknown."""

    def answered(self, endpoint: str, tokens: int, drafted: int, accepted: int) -> None:
        """Do nothing: the record is fixed."""

    def report(self, endpoint: str, active: int, waiting: int, speed: float) -> None:
        """Do nothing: the record is fixed."""

    async def named(self, name: str) -> Listed:
        return Listed(model(MODEL), tuple(self._records))


async def main(name: str, ports: Sequence[int], engine: str, key_file: str = "") -> None:
    http, peer, other = ports
    given = FixedCluster(name, engine)
    identity = Identity(KEYS[name], Tokens.read(""))
    peers = RpcServer(identity)
    peer_id = IDS["b" if name == "a" else "a"]
    reach = Dialer(identity, lambda node: (("127.0.0.1", other),) if node == peer_id else ())
    calls = RpcClient(reach, peers)
    settings = ServingSettings()
    server = EndpointServer(given, given, settings, peers)
    serving = Serving(
        given, given, calls, server, Loader(given, calls), Router(IDS[name]), settings, HttpSettings()
    )
    await peers.start("127.0.0.1", peer)
    await server.start()
    await serving.start()
    # The own address is a trusted proxy, so that callers can claim to be another machine.
    facts = HttpSettings(
        "127.0.0.1", http, auth="keys" if key_file else "open", trusted_proxies=("127.0.0.1",)
    )
    keys = Keys(given, calls, Path(f"{key_file}.json")) if key_file else None
    if keys is not None:
        _, secret = await keys.create("bench", Scope.INFER)
        await asyncio.to_thread(Path(key_file).write_text, secret)
    built = parts(serving, model(MODEL), cluster=PlainCluster(given.me), keys=keys)
    await Listener(build_app(built, facts), facts).start()
    gc.collect()
    gc.freeze()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], [int(word) for word in sys.argv[2:5]], *sys.argv[5:]))
