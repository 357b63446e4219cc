"""The last log lines of a model's engines on all participating nodes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sollold.cluster.gossip.record import Backend, Endpoint, Placed, State
from sollold.control.logs import LogService
from sollold.errors import Fault, Refusal
from sollold.models.names import Resolved, resolve
from tests.doubles import FakeView, World, record
from tests.models.fakes import FakeCalls, FakeServer

DEPLOYMENT = "d-1"
ENDPOINT = Endpoint(
    DEPLOYMENT, "big:latest", "f" * 64, Backend.SHARDED, State.READY,
    placed=(Placed("a", "CPU", 0, 4, 1), Placed("b", "CPU", 4, 9, 1), Placed("gone", "CPU", 9, 12, 1)),
)  # fmt: skip


def resolve_name(asked: str) -> Resolved:
    """Resolve ``asked`` in a library with one model and a user-defined alias."""
    return resolve(asked, [ENDPOINT.model], {"gpt-4o": ENDPOINT.model})


class Nodes:
    """Nodes that see each other's records and call each other in this process."""

    def __init__(self) -> None:
        self.world = World()
        self.servers: dict[str, FakeServer] = {}

    def start(self, name: str, folder: Path, *endpoints: Endpoint) -> LogService:
        view = FakeView(record(name, endpoints=endpoints), self.world)
        service = LogService(view, FakeCalls(name, self.servers), resolve_name, folder)
        self.servers[name] = FakeServer()
        service.register(self.servers[name])
        return service


def written(folder: Path, process: str, lines: int) -> Path:
    (folder / DEPLOYMENT).mkdir(parents=True, exist_ok=True)
    (folder / DEPLOYMENT / f"{process}.log").write_text("".join(f"{process} {k}\n" for k in range(lines)))
    return folder


async def test_logs_of_all_engines_of_a_model(tmp_path: Path) -> None:
    nodes = Nodes()
    a = nodes.start("a", written(tmp_path / "a", "llama-server", 100), ENDPOINT)
    nodes.start("b", written(tmp_path / "b", "worker", 3))
    for name in ("big", "BIG:latest", "gpt-4o", "big.gguf", DEPLOYMENT):
        found = await a.tail(name, 2)
        assert [(log.node, log.process, log.text) for log in found[:2]] == [
            ("name-a", "llama-server", "llama-server 98\nllama-server 99"),
            ("name-b", "worker", "worker 1\nworker 2"),
        ]
        assert found[2].node == "gone" and "could not be reached" in found[2].reason


async def test_an_unloaded_model_has_no_log_and_other_files_are_not_read(tmp_path: Path) -> None:
    nodes = Nodes()
    outside = replace(ENDPOINT, id="../secret", placed=())
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "x.log").write_text("secret")
    folder = tmp_path / "logs"
    folder.mkdir()
    a = nodes.start("a", folder, outside)
    assert await a.tail("big", 10) == ()
    with pytest.raises(Refusal, match="not loaded") as refused:
        await a.tail("other", 10)
    assert refused.value.fault is Fault.NOT_FOUND


async def test_a_running_model_has_a_log_without_its_file(tmp_path: Path) -> None:
    nodes = Nodes()
    gone = replace(ENDPOINT, model="gone:latest", placed=())
    a = nodes.start("a", written(tmp_path / "a", "llama-server", 1), gone)
    assert [log.text for log in await a.tail("gone", 5)] == ["llama-server 0"]
