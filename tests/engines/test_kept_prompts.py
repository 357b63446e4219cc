"""Processed prompts are saved when a model is unloaded and restored when it is loaded again."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from sollold.engines.address import EngineAddress
from sollold.engines.install.find import Llama
from sollold.engines.llamacpp import kept_prompts
from sollold.engines.llamacpp.kept_prompts import KeptPrompts
from sollold.models.gguf.demo_model import Recital, counting, write
from tests.daemons import Cluster, Node, until
from tests.gguf import writer
from tests.gguf.size import Size
from tests.http_double import HttpDouble

BIG = Recital(counting(320), name="count", layers=3, width=256, hidden=40_960, heavy=True)


def ask(node: Node, text: str) -> dict[str, Any]:
    body = {"model": "count", "messages": [{"role": "user", "content": text}], "max_tokens": 4}
    reply = node.ask("POST", "/v1/chat/completions", body)
    assert reply.status == 200, reply.body
    usage: dict[str, Any] = reply.json["usage"]
    return usage


@pytest.fixture
def cluster(tmp_path: Path, llama: Llama) -> Iterator[Cluster]:
    """Two daemons that only together have enough memory for the model."""
    settings = {"placement.context": 1024, "placement.slots": 2, "placement.ubatch": 32}
    with Cluster(
        2, tmp_path, llama, memory="125 MiB", settings=settings, start=False, loopback=True
    ) as nodes:
        write(nodes[0].models / "count.gguf", BIG)
        for node in nodes:
            node.start()
        nodes.together()
        until(lambda: b"count" in nodes[1].ask("GET", "/api/tags").body, "the model is known")
        yield nodes


@pytest.mark.llama
@pytest.mark.cluster
def test_a_conversation_is_not_processed_again_after_an_unload(cluster: Cluster) -> None:
    text = "w0001 " * 500
    first = ask(cluster[0], text)
    assert first["prompt_tokens"] > 500
    (loaded,) = cluster.deployments()
    head = next(node for node in cluster if node.name == loaded["node_name"])
    unloaded = cluster[0].ask("POST", "/api/cluster/unload", {"model": "count"})
    assert unloaded.status == 200, unloaded.body
    until(lambda: not cluster.deployments(), "it is unloaded")
    kept = [file for node in cluster for file in (node.folder / "cache" / "prompts").iterdir()]
    assert len(kept) == 1 and kept[0].stat().st_size > 10_000
    assert kept[0].parent.stat().st_mode & 0o77 == 0 and kept[0].stat().st_mode & 0o77 == 0
    second = ask(cluster[0], text + "w0002")
    cached = second["prompt_tokens_details"]["cached_tokens"]
    assert cached >= first["prompt_tokens"] - 16
    assert not kept[0].exists()
    assert head.stop() == 0
    assert not kept[0].parent.exists()


@pytest.mark.llama
@pytest.mark.cluster
def test_prompts_that_can_not_be_reused_are_not_saved(tmp_path: Path, llama: Llama) -> None:
    settings = {"placement.context": 1024, "placement.slots": 1}
    with Cluster(1, tmp_path, llama, settings=settings, loopback=True) as nodes:
        (node,) = nodes
        writer.write(node.models / "slides.gguf", "gemma3", Size(layers=6))
        write(node.models / "drafts.gguf", Recital(counting(320), name="drafts", layers=2))
        write(node.models / "small.gguf", Recital(counting(320), name="small", layers=1, width=192))
        nodes.together()
        until(lambda: b"slides" in node.ask("GET", "/api/tags").body, "the models are known")
        for model, options in (("slides", {}), ("drafts", {"speculation": "small"})):
            loaded = node.ask("POST", "/api/cluster/load", {"model": model, **options})
            assert loaded.status == 200 and bool(loaded.json["speculation"]) == bool(options), loaded.body
            body = {"model": model, "prompt": "w0001 w0002 w0003 " * 100, "max_tokens": 2}
            answer = node.ask("POST", "/v1/completions", body)
            assert answer.json["usage"]["prompt_tokens"] > 256, answer.body
            assert node.ask("POST", "/api/cluster/unload", {"model": model}).status == 200
            until(lambda: not nodes.deployments(), "it is unloaded")
        assert "processed prompts" not in node.log()
        assert list((node.folder / "cache" / "prompts").iterdir()) == []


class Engine(HttpDouble):
    """A double of llama-server with endpoints for its slots."""

    def __init__(self, tokens: tuple[int, ...], folder: Path, size: int = 1000) -> None:
        self.tokens, self.folder, self.size = tokens, folder, size
        self.restored: list[str] = []
        self.fails = False

    async def start(self) -> EngineAddress:
        app = web.Application()
        app.router.add_get("/slots", self._slots)
        app.router.add_post("/slots/{id}", self._act)
        return EngineAddress(await self.serve(app), "secret")

    async def _slots(self, request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == "Bearer secret"
        slots = [{"id": i, "is_processing": False, "n_prompt_tokens": n} for i, n in enumerate(self.tokens)]
        return web.json_response(slots)

    async def _act(self, request: web.Request) -> web.Response:
        if self.fails:
            return web.Response(status=501)
        file = self.folder / (await request.json())["filename"]
        if request.query["action"] == "save":
            file.write_bytes(b"x" * self.size)
        else:
            self.restored.append(file.name)
        return web.json_response({})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def test_only_long_prompts_are_saved_within_the_limit(tmp_path: Path) -> None:
    kept = KeptPrompts(tmp_path / "prompts", 2500)
    kept.open()
    folder = kept.folder
    assert folder is not None
    engine = Engine((10, 300, 4000), folder)
    address = await engine.start()
    async with aiohttp.ClientSession() as http:
        await kept.save(http, address, "a", 2000, 8000)
        assert names(folder) == ["a-1", "a-2"]
        await kept.save(http, address, "b", 2000, 8000)
        assert names(folder) == ["b-1", "b-2"]
        engine.fails = True
        await kept.save(http, address, "d", 2000, 8000)
        assert names(folder) == ["b-1", "b-2"]
        engine.fails = False
        await kept.restore(http, address, "other")
        assert engine.restored == []
        await kept.restore(http, address, "b")
        assert sorted(engine.restored) == ["b-1", "b-2"] and names(folder) == []
        kept.close()
        await kept.save(http, address, "e", 2000, 8000)
    assert not folder.exists()
    await engine.close()


async def test_a_disk_that_becomes_read_only_does_not_fail_loads_and_unloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the system remounts the disk read-only after an error."""
    kept = KeptPrompts(tmp_path / "prompts", 2500)
    kept.open()
    engine = Engine((300, 4000), kept.folder or tmp_path)
    address = await engine.start()

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    async with aiohttp.ClientSession() as http:
        await kept.save(http, address, "a", 2000, 8000)
        monkeypatch.setattr(os, "unlink", refused)
        monkeypatch.setattr(os, "rmdir", refused)
        await kept.restore(http, address, "a")
        assert sorted(engine.restored) == ["a-0", "a-1"]
        await kept.save(http, address, "b", 20_000, 8000)
        kept.close()
    monkeypatch.undo()
    await engine.close()


async def test_a_disk_that_does_not_respond_stops_no_load_and_no_unload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_prompts, "_DISK_SECONDS", 0.05)
    kept = KeptPrompts(tmp_path / "prompts", 2500)
    kept.open()
    engine = Engine((300, 4000), kept.folder or tmp_path)
    address = await engine.start()
    responds = threading.Event()

    def hang() -> list[Any]:
        assert responds.wait(30)
        return []

    monkeypatch.setattr(kept, "_files", hang)
    try:
        async with aiohttp.ClientSession() as http, asyncio.timeout(5.0):
            await kept.save(http, address, "a", 2000, 8000)
            await kept.restore(http, address, "a")
    finally:
        responds.set()
    await engine.close()


async def test_files_that_another_engine_still_writes_are_kept(tmp_path: Path) -> None:
    kept = KeptPrompts(tmp_path / "prompts", 2500)
    kept.open()
    engine = Engine((300,), kept.folder or tmp_path)
    address = await engine.start()
    (tmp_path / "prompts" / "other-0.part").write_bytes(b"x")
    (tmp_path / "prompts" / "a-1.part").write_bytes(b"x")
    async with aiohttp.ClientSession() as http:
        await kept.save(http, address, "a", 2000, 8000)
    assert names(tmp_path / "prompts") == ["a-0", "other-0.part"]
    await engine.close()


async def test_prompts_that_fit_are_saved_if_all_together_exceed_the_limit(tmp_path: Path) -> None:
    kept = KeptPrompts(tmp_path / "prompts", 2500)
    kept.open()
    engine = Engine((300, 4000, 500), kept.folder or tmp_path)
    address = await engine.start()
    async with aiohttp.ClientSession() as http:
        await kept.save(http, address, "a", 20_000, 8000)
    assert names(tmp_path / "prompts") == ["a-0", "a-2"], "only the prompts that fit"
    await engine.close()


def test_no_prompts_are_saved_if_disabled_or_without_a_folder(tmp_path: Path) -> None:
    off = KeptPrompts(tmp_path / "off", 0)
    off.open()
    assert off.folder is None and not (tmp_path / "off").exists()
    (tmp_path / "file").touch()
    without_folder = KeptPrompts(tmp_path / "file" / "prompts", 1000)
    without_folder.open()
    assert without_folder.folder is None
