"""The last log lines of a model's engines on all participating nodes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sollold.cluster.gossip.record import Backend, Endpoint, Placed, Record, State
from sollold.cluster.net.rpc import PeerError
from sollold.control.logs import EngineLogs, LogService
from sollold.errors import Fault, Refusal
from sollold.models.names import Resolved, resolve

DEPLOYMENT = "d-1"
ENDPOINT = Endpoint(
    DEPLOYMENT, "big:latest", "f" * 64, Backend.SHARDED, State.READY,
    placed=(Placed("a", "CPU", 0, 4, 1), Placed("b", "CPU", 4, 9, 1), Placed("gone", "CPU", 9, 12, 1)),
)  # fmt: skip


def resolve_name(asked: str) -> Resolved:
    """Resolve ``asked`` in a library with one model and a user-defined alias."""
    return resolve(asked, [ENDPOINT.model], {"gpt-4o": ENDPOINT.model})


class Network:
    """Nodes in one process that can call each other."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        self.methods: dict[str, Callable[[str, Any], Awaitable[Any]]] = {}

    def node(self, name: str, folder: Path, *endpoints: Endpoint) -> LogService:
        self.records[name] = Record(
            name, f"name-{name}", 1, ("127.0.0.1",), 1, 2, "test", endpoints=endpoints
        )
        service = LogService(_View(self, name), self, resolve_name, folder)  # type: ignore[arg-type]
        self.at = name
        service.register(self)  # type: ignore[arg-type]
        return service

    def method(self, name: str, kind: type, handler: Callable[[str, Any], Awaitable[Any]]) -> None:
        self.methods[self.at] = handler

    async def call(self, node: str, method: str, order: Any, kind: type, *, timeout: float) -> EngineLogs:
        if node not in self.methods:
            raise PeerError(node, f"{node} does not answer", transport=True)
        found: EngineLogs = await self.methods[node]("a", order)
        return found


class _View:
    def __init__(self, network: Network, name: str) -> None:
        self._network, self._name = network, name

    @property
    def me(self) -> Record:
        return self._network.records[self._name]

    def live(self) -> tuple[Record, ...]:
        return tuple(self._network.records.values())

    def record(self, node: str) -> Record | None:
        return self._network.records.get(node)


def written(folder: Path, process: str, lines: int) -> Path:
    (folder / DEPLOYMENT).mkdir(parents=True, exist_ok=True)
    (folder / DEPLOYMENT / f"{process}.log").write_text("".join(f"{process} {k}\n" for k in range(lines)))
    return folder


async def test_logs_of_all_engines_of_a_model(tmp_path: Path) -> None:
    network = Network()
    a = network.node("a", written(tmp_path / "a", "llama-server", 100), ENDPOINT)
    network.node("b", written(tmp_path / "b", "worker", 3))
    for name in ("big", "BIG:latest", "gpt-4o", "big.gguf", DEPLOYMENT):
        found = await a.tail(name, 2)
        assert [(log.node, log.process, log.text) for log in found[:2]] == [
            ("name-a", "llama-server", "llama-server 98\nllama-server 99"),
            ("name-b", "worker", "worker 1\nworker 2"),
        ]
        assert found[2].node == "gone" and "does not answer" in found[2].reason


async def test_an_unloaded_model_has_no_log_and_other_files_are_not_read(tmp_path: Path) -> None:
    network = Network()
    outside = replace(ENDPOINT, id="../secret", placed=())
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "x.log").write_text("secret")
    folder = tmp_path / "logs"
    folder.mkdir()
    a = network.node("a", folder, outside)
    assert await a.tail("big", 10) == ()
    with pytest.raises(Refusal, match="not loaded") as refused:
        await a.tail("other", 10)
    assert refused.value.fault is Fault.NOT_FOUND


async def test_a_running_model_has_a_log_without_its_file(tmp_path: Path) -> None:
    network = Network()
    gone = replace(ENDPOINT, model="gone:latest", placed=())
    a = network.node("a", written(tmp_path / "a", "llama-server", 1), gone)
    assert [log.text for log in await a.tail("gone", 5)] == ["llama-server 0"]
