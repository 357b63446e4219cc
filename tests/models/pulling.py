"""Nodes that exchange models, for tests of transfers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from sollold.control.local_models import OwnModels
from sollold.models.library import Library
from sollold.models.stores.catalogue import Catalogue
from sollold.models.transfer.internet import Internet
from sollold.models.transfer.ollama_registry import OllamaRegistry
from sollold.models.transfer.partial_file import PartialFile
from sollold.models.transfer.peer_source import Sender
from sollold.models.transfer.pull import Puller
from sollold.models.transfer.rate_limit import RateLimit
from sollold.settings.schema import ModelSettings
from tests.doubles import FakeView, record
from tests.models.fakes import FakeCalls, FakeServer
from tests.models.stores import write_gguf

PART = 8192


class Node:
    """A node that can send and pull models."""

    def __init__(self, name: str, folder: Path, servers: dict[str, FakeServer], rate: int = 0) -> None:
        self.name, self.folder = name, folder
        self.view = FakeView(record(name))
        self.server = servers.setdefault(name, FakeServer())
        self.calls = FakeCalls(name, servers)
        self.ollama = ""
        self.in_ollama: set[str] = set()
        self.environ: dict[str, str] = {}
        settings = ModelSettings(folders=(str(folder / "m"),), ollama_stores=(str(folder / "store"),))
        self.catalogue = Catalogue(settings, folder / "state", environ={}, home=folder, interval=0.02)
        self.library = Library(self.catalogue, self.view, self.calls, self.server)
        limit = RateLimit(rate)
        self.sender = Sender(self.catalogue, self.server, name, limit)
        self.internet = Internet(self.environ)
        self.registry = OllamaRegistry(self.internet, "http://127.0.0.1:9")
        self.puller = Puller(
            self.library,
            self.catalogue,
            self.calls,
            name,
            limit,
            self.internet,
            self.registry,
            lambda: self.ollama,
            self.in_ollama.__contains__,
        )
        self.own = OwnModels(self.catalogue, self.server)

    async def start(self) -> None:
        await self.catalogue.start()
        await self.library.lists.start()
        await self.server.serve()

    async def close(self) -> None:
        await self.puller.close()
        await self.internet.close()
        await self.server.close()
        self.sender.close()
        await self.library.lists.close()
        await self.catalogue.close()

    async def pull(self, name: str) -> list[dict[str, Any]]:
        return [line async for line in self.puller.pull(name)]


class ThreeNodes:
    def __init__(self, tmp_path: Path) -> None:
        self.servers: dict[str, FakeServer] = {}
        self.nodes = [Node(name, tmp_path / name, self.servers) for name in ("a", "b", "c")]

    async def start(self) -> None:
        for node in self.nodes:
            await node.start()
        for node in self.nodes:
            node.view.others = {other.name: other.view.me for other in self.nodes if other is not node}
            node.view.tell()


@pytest.fixture
async def three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ThreeNodes]:
    monkeypatch.setattr(PartialFile.__init__, "__defaults__", (PART,))
    three = ThreeNodes(tmp_path)
    yield three
    for node in three.nodes:
        await node.close()


def big(path: Path, seed: int = 0, **more: Any) -> Path:
    """Write a model that is transferred in several parts."""
    return write_gguf(path, seed=seed, tensors=[f"blk.0.t{k}.weight" for k in range(40)], **more)


def sole(folder: Path) -> Path:
    """The only complete model file below ``folder``."""
    (path,) = [path for path in folder.rglob("*.gguf") if ".parts" not in path.parts]
    return path


def stored_once(node: Node) -> bool:
    """Whether the two models of a node have the same file on its disk."""
    first, second = node.catalogue.models
    return Path(first.files[0]).samefile(second.files[0])


def unfinished(node: Node) -> list[Path]:
    """The files of incomplete transfers."""
    return [path for path in node.catalogue.own.rglob("*.gguf") if ".parts" in path.parts]


async def until_completed(stream: AsyncIterator[dict[str, Any]], wanted: int) -> None:
    """Read progress until ``wanted`` bytes are complete."""
    async for line in stream:
        if line.get("completed", 0) >= wanted:
            return
