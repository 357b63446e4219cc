from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import sys
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from sollold.cluster.peer import PeerError
from sollold.config import ModelSettings
from sollold.models import gguf
from sollold.models.catalogue import Catalogue
from sollold.models.fill import Fill, SourceError, Stop
from sollold.models.hub import choose
from sollold.models.landing import Item, Landing, LandingError
from sollold.models.library import Library
from sollold.models.own_models import OwnError, OwnModels, Told
from sollold.models.pace import Pace
from sollold.models.pull import Puller, PullError
from sollold.models.transfer import Sender
from tests.models.fakes import FakeCalls, FakeServer, FakeView, record, until
from tests.models.stores import OllamaStore, write_gguf
from tests.ollama_standin import Known, Standin

PART = 8192


class Node:
    """A node that can give and take models."""

    def __init__(self, name: str, folder: Path, servers: dict[str, FakeServer], rate: int = 0) -> None:
        self.name, self.folder = name, folder
        self.view = FakeView(record(name))
        self.server = servers.setdefault(name, FakeServer())
        self.calls = FakeCalls(name, servers)
        self.ollama = ""
        self.environ: dict[str, str] = {}
        settings = ModelSettings(folders=(str(folder / "m"),), ollama_stores=(str(folder / "store"),))
        self.catalogue = Catalogue(settings, folder / "state", environ={}, home=folder, interval=0.02)
        self.library = Library(self.catalogue, self.view, self.calls, self.server)
        pace = Pace(rate)
        self.sender = Sender(self.catalogue, self.server, name, pace)
        self.puller = Puller(
            self.library, self.catalogue, self.calls, name, pace, lambda: self.ollama, self.environ
        )
        self.own = OwnModels(self.catalogue, self.server)

    async def start(self) -> None:
        await self.catalogue.start()
        await self.library.start()
        await self.server.serve()

    async def close(self) -> None:
        await self.puller.close()
        await self.server.close()
        self.sender.close()
        await self.library.close()
        await self.catalogue.close()

    async def pull(self, name: str) -> list[dict[str, Any]]:
        return [line async for line in self.puller.pull(name)]


class Town:
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
async def town(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Town]:
    monkeypatch.setattr(Landing.__init__, "__defaults__", (PART,))
    town = Town(tmp_path)
    yield town
    for node in town.nodes:
        await node.close()


def big(path: Path, seed: int = 0, **more: Any) -> Path:
    """A model of several parts."""
    return write_gguf(path, seed=seed, tensors=[f"blk.0.t{k}.weight" for k in range(40)], **more)


def sole(folder: Path) -> Path:
    (path,) = [path for path in folder.rglob("*.gguf") if ".parts" not in path.parts]
    return path


def unfinished(node: Node) -> list[Path]:
    return [path for path in node.catalogue.own.rglob("*.gguf") if ".parts" in path.parts]


async def test_from_a_node(town: Town) -> None:
    a, b, _ = town.nodes
    path = big(b.folder / "m" / "tiny-F16.gguf")
    await town.start()
    await until(lambda: a.library.find("tiny"))
    lines = await a.pull("tiny:f16")
    statuses = [line["status"] for line in lines]
    assert statuses[0] == "pulling manifest"
    assert statuses[-3:] == ["verifying sha256 digest", "writing manifest", "success"]
    moving = [line for line in lines if line["status"].startswith("pulling ") and "total" in line]
    assert moving[-1]["completed"] == moving[-1]["total"] == path.stat().st_size
    assert moving[-1]["digest"].startswith("sha256:")
    model = a.catalogue.get("tiny:F16")
    assert model is not None
    assert (model.source, model.digest) == ("own", b.catalogue.models[0].digest)
    assert sole(a.catalogue.own).read_bytes() == path.read_bytes()
    assert unfinished(a) == []
    assert [node for node, _ in a.library.find("tiny")] == ["a", "b"]
    again = await a.pull("tiny:F16")
    assert [line["status"] for line in again] == ["pulling manifest", "success"]


async def test_a_name_to_be_pulled_is_not_guessed(town: Town) -> None:
    a, b, _ = town.nodes
    write_gguf(b.folder / "m" / "tiny-F16.gguf")
    await town.start()
    await until(lambda: a.library.find("tiny"))
    with pytest.raises(PullError, match=r"has tiny:latest.* did you mean tiny:F16\?") as caught:
        await a.pull("tiny")
    assert caught.value.missing
    async with Standin([]) as standin:
        a.ollama = standin.url
        await a.pull("tiny")
        assert list(standin.models) == ["tiny:latest"]
    assert a.catalogue.models == ()


async def test_an_alias_is_pulled_by_what_it_stands_for(town: Town) -> None:
    a, b, _ = town.nodes
    a.library._aliases["gpt-4o"] = "Tiny:F16"
    write_gguf(b.folder / "m" / "tiny-F16.gguf")
    await town.start()
    await until(lambda: a.library.find("tiny"))
    await a.pull("gpt-4o")
    assert [model.name for model in a.catalogue.models] == ["tiny:F16"]


async def test_name_template_and_the_rest_come_along(town: Town, tmp_path: Path) -> None:
    a, b, _ = town.nodes
    store = OllamaStore(b.folder / "store")
    extra = [
        store.layer("system", b"You are Mario."),
        store.layer("template", b"{{ .Prompt }}"),
        store.layer("projector", write_gguf(tmp_path / "p", architecture="clip").read_bytes()),
        store.layer("adapter", write_gguf(tmp_path / "l", metadata={"general.type": "adapter"}).read_bytes()),
    ]
    store.model("mike/mario:7b", tmp_path, extra=extra)
    await town.start()
    await until(lambda: a.library.find("mike/mario:7b"))
    await a.pull("mike/mario:7b")
    got, had = a.catalogue.get("mike/mario:7b"), b.catalogue.get("mike/mario:7b")
    assert got is not None
    assert had is not None
    assert (got.system, got.template, got.manifest) == ("You are Mario.", "{{ .Prompt }}", had.manifest)
    assert got.digest == had.digest
    assert got.projector
    assert len(got.adapters) == 1
    assert len(a.catalogue.models) == 1


async def test_shards(town: Town) -> None:
    a, b, _ = town.nodes
    for number in (1, 2):
        split = {"split.no": number - 1, "split.count": 2, "split.tensors.count": 80}
        names = [f"blk.{number}.t{k}.weight" for k in range(40)]
        write_gguf(b.folder / "m" / f"big-0000{number}-of-00002.gguf", metadata=split, tensors=names)
    await town.start()
    await until(lambda: a.library.find("big"))
    await a.pull("big")
    model = a.catalogue.get("big:latest")
    assert model is not None
    assert not model.unusable
    assert [Path(file).name for file in model.files] == [
        "model-00001-of-00002.gguf",
        "model-00002-of-00002.gguf",
    ]


async def test_goes_on_after_its_end_at_any_point(town: Town) -> None:
    a, b, _ = town.nodes
    path = big(b.folder / "m" / "tiny.gguf")
    await town.start()
    await until(lambda: a.library.find("tiny"))
    parts = -(-path.stat().st_size // PART)
    assert parts > 8
    for stop in range(1, parts):
        before = b.server.asked

        async def limited(request: web.Request, stop: int = stop, before: int = before) -> None:
            if b.server.asked - before > 1:
                await asyncio.sleep(60)

        b.server.fault = limited
        stream = a.puller.pull("tiny")
        async with asyncio.timeout(10):
            await until_completed(stream, stop * PART)
        await stream.aclose()
        assert a.catalogue.get("tiny:latest") is None
        assert not (a.catalogue.own / "tiny.gguf").exists()
    b.server.fault = None
    asked = b.server.asked
    await a.pull("tiny")
    assert b.server.asked - asked <= 2, "what had come is not fetched again"
    assert sole(a.catalogue.own).read_bytes() == path.read_bytes()


async def until_completed(stream: AsyncIterator[dict[str, Any]], wanted: int) -> None:
    async for line in stream:
        if line.get("completed", 0) >= wanted:
            return


async def test_a_source_that_dies_is_replaced_by_another(town: Town) -> None:
    a, b, c = town.nodes
    for node in (b, c):
        path = big(node.folder / "m" / "tiny.gguf")
    await town.start()
    await until(lambda: len(a.library.find("tiny")) == 2)

    async def dies(request: web.Request) -> None:
        if b.server.asked > 2:
            assert request.transport is not None
            request.transport.abort()
            await asyncio.sleep(60)

    b.server.fault = dies
    await a.pull("tiny")
    assert sole(a.catalogue.own).read_bytes() == path.read_bytes()
    assert c.server.asked


async def test_all_sources_gone_says_so_and_keeps_what_came(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sollold.models.fill._FAILURES", 1)
    a, b, _ = town.nodes
    big(b.folder / "m" / "tiny.gguf")
    await town.start()
    await until(lambda: a.library.find("tiny"))

    async def dies(request: web.Request) -> None:
        if b.server.asked > 3:
            assert request.transport is not None
            request.transport.abort()
            await asyncio.sleep(60)

    b.server.fault = dies
    with pytest.raises(PullError, match="node b"):
        await a.pull("tiny")
    assert a.catalogue.models == ()
    assert unfinished(a)


async def test_other_content_is_thrown_away(town: Town) -> None:
    a, b, _ = town.nodes
    path = big(b.folder / "m" / "tiny.gguf", seed=1)
    await town.start()
    await until(lambda: a.library.find("tiny"))

    async def swap(request: web.Request) -> None:
        raw = bytearray(path.read_bytes())
        raw[-2000:] = b"x" * 2000
        status = path.stat()
        path.write_bytes(raw)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        b.server.fault = None

    b.server.fault = swap
    with pytest.raises(PullError, match="not what was asked for"):
        await a.pull("tiny")
    assert a.catalogue.models == ()
    assert unfinished(a) == []


def alike(town: Town) -> tuple[bytes, bytes]:
    """On nodes b and c, files that no sample tells apart though bytes all over them differ."""
    _, b, c = town.nodes
    names = [f"blk.0.t{k}.weight" for k in range(1000)]
    path = write_gguf(b.folder / "m" / "tiny.gguf", tensors=names)
    raw = bytearray(path.read_bytes())
    header = gguf.read(str(path))
    start = min(tensor.offset for tensor in header.tensors)
    room = len(raw) - start
    for place in range(64):
        raw[start + room * place // 64 + 8192] ^= 1
    other = c.folder / "m" / "tiny.gguf"
    other.parent.mkdir(parents=True)
    other.write_bytes(raw)
    return path.read_bytes(), bytes(raw)


async def test_no_mixture_of_files_that_samples_do_not_tell_apart(town: Town) -> None:
    a, b, c = town.nodes
    first, second = alike(town)
    await town.start()
    await until(lambda: len(a.library.find("tiny")) == 2)
    await a.pull("tiny")
    assert sole(a.catalogue.own).read_bytes() == first != second
    assert b.server.asked and c.server.asked


async def test_when_the_measure_dies_what_has_come_is_measured_anew(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sollold.models.part_check._ATTEMPTS", 1)
    a, b, _ = town.nodes
    _, second = alike(town)
    await town.start()
    await until(lambda: len(a.library.find("tiny")) == 2)

    async def dies(request: web.Request) -> None:
        if b.server.asked > 100:
            a.calls.cut.add("b")

    b.server.fault = dies
    await a.pull("tiny")
    assert sole(a.catalogue.own).read_bytes() == second


async def test_a_part_that_was_resumed_by_the_word_of_another_is_measured_anew(town: Town) -> None:
    a, _, _ = town.nodes
    first, second = alike(town)
    await town.start()
    await until(lambda: len(a.library.find("tiny")) == 2)
    a.calls.cut.add("c")
    stream = a.puller.pull("tiny")
    await until_completed(stream, len(first) // 2)
    await stream.aclose()
    a.calls.cut = {"b"}
    await a.pull("tiny")
    assert sole(a.catalogue.own).read_bytes() == second


async def test_a_transfer_takes_no_thread_from_the_rest_of_the_daemon(town: Town) -> None:
    a, b, _ = town.nodes
    big(b.folder / "m" / "tiny.gguf")
    await town.start()
    await until(lambda: a.library.find("tiny"))
    loop = asyncio.get_running_loop()
    shared, free = ThreadPoolExecutor(1), threading.Event()
    loop.set_default_executor(shared)
    shared.submit(free.wait, 60)
    try:
        stream = a.puller.pull("tiny")
        async with asyncio.timeout(10):
            statuses = []
            async for line in stream:
                statuses.append(line["status"])
                if line["status"] == "writing manifest":
                    break
        assert statuses[-1] == "writing manifest"
    finally:
        free.set()
    await stream.aclose()


async def test_many_callers_one_fetch(town: Town) -> None:
    a, b, _ = town.nodes
    path = big(b.folder / "m" / "tiny.gguf")
    await town.start()
    await until(lambda: a.library.find("tiny"))
    leaver = a.puller.pull("tiny")
    assert (await anext(leaver))["status"] == "pulling manifest"
    others = [asyncio.create_task(a.pull("tiny:latest")) for _ in range(3)]
    await asyncio.sleep(0)
    await leaver.aclose()
    for lines in await asyncio.gather(*others):
        assert lines[-1]["status"] == "success"
    assert b.server.asked == -(-path.stat().st_size // PART)


async def test_a_caller_who_reads_slowly_keeps_no_old_answer_alive(town: Town) -> None:
    a, b, _ = town.nodes
    big(b.folder / "m" / "tiny.gguf")
    await town.start()
    await until(lambda: a.library.find("tiny"))
    a.calls.cut = {"b"}
    slow = a.puller.pull("tiny")
    assert (await anext(slow))["status"] == "pulling manifest"
    with pytest.raises(PullError, match="could not be reached"):
        await a.pull("tiny")
    a.calls.cut = set()
    assert (await a.pull("tiny"))[-1]["status"] == "success"
    with pytest.raises(PullError, match="could not be reached"):
        async for _ in slow:
            pass


async def test_asking_again_waits_for_the_end_of_the_fetch_that_was_left(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, _ = town.nodes
    big(b.folder / "m" / "tiny.gguf")
    await town.start()
    await until(lambda: a.library.find("tiny"))
    begun, go_on = threading.Event(), threading.Event()
    done: list[str] = []
    settle, opened = Landing.settle, Landing.open

    def slowly(self: Landing, name: str, beside: dict[str, bytes]) -> Path:
        begun.set()
        go_on.wait(30)
        done.append("settled")
        return settle(self, name, beside)

    def told(self: Landing) -> None:
        done.append("opened")
        opened(self)

    first = a.puller.pull("tiny")
    monkeypatch.setattr(Landing, "settle", slowly)
    async for line in first:
        if line["status"] == "writing manifest":
            break
    await until(begun.is_set)
    monkeypatch.setattr(Landing, "open", told)
    leaving = asyncio.create_task(first.aclose())
    await asyncio.sleep(0)
    again = asyncio.create_task(a.pull("tiny"))
    for _ in range(100):
        await asyncio.sleep(0)
    go_on.set()
    await leaving
    assert (await again)[-1]["status"] == "success"
    assert done[0] == "settled", "two fetches at work on the same files"
    assert sole(a.catalogue.own)


async def test_leaving_ends_the_reading_of_what_has_come(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, _ = town.nodes
    content = big(b.folder / "x.gguf").read_bytes()
    store = OllamaStore(b.folder / "store")
    store.manifest("tiny:latest", [store.layer("model", content)])
    await town.start()
    await until(lambda: a.library.find("tiny"))
    reading, go_on = threading.Event(), threading.Event()
    pread, verify = os.pread, Landing.verify

    def slowly(handle: int, size: int, offset: int) -> bytes:
        if threading.current_thread() in verifying:
            reading.set()
            go_on.wait(30)
        return pread(handle, size, offset)

    def verified(self: Landing, check: Any) -> None:
        verifying.append(threading.current_thread())
        verify(self, check)

    verifying: list[threading.Thread] = []
    monkeypatch.setattr(os, "pread", slowly)
    monkeypatch.setattr(Landing, "verify", verified)
    monkeypatch.setattr("sollold.models.landing._PIECE", 1024)
    stream = a.puller.pull("tiny")
    async for line in stream:
        if line["status"] == "verifying sha256 digest":
            break
    await until(reading.is_set)
    checked: list[str] = []
    monkeypatch.setattr("sollold.models.pull.fault_of", lambda *_: checked.append("all was read") or "")
    leaving = asyncio.create_task(stream.aclose())
    for _ in range(20):
        await asyncio.sleep(0)
    go_on.set()
    await leaving
    assert checked == []
    assert unfinished(a), "what has come is kept"
    monkeypatch.undo()
    assert (await a.pull("tiny"))[-1]["status"] == "success"


async def test_who_joins_a_fetch_from_nodes_alone_gets_the_model_from_elsewhere(town: Town) -> None:
    a, b, _ = town.nodes
    big(b.folder / "m" / "tiny.gguf")
    await town.start()
    await until(lambda: a.library.find("tiny"))
    kind, _ = b.server.methods["parcel"]
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def fails(caller: str, request: Any) -> Any:
        asked.set()
        await go_on.wait()
        raise PeerError("b", "its disk fails", transport=False)

    b.server.methods["parcel"] = (kind, fails)
    async with Standin([]) as standin:
        a.ollama = standin.url
        alone = a.puller.pull("tiny", nodes_only=True)
        await anext(alone)
        await asked.wait()
        joined = asyncio.create_task(a.pull("tiny"))
        await asyncio.sleep(0)
        go_on.set()
        assert (await joined)[-1] == {"status": "success"}
        await alone.aclose()
        assert "tiny:latest" in standin.models


async def test_names_from_another_node_stay_in_our_folder(town: Town) -> None:
    a, b, _ = town.nodes
    big(b.folder / "m" / "tiny.gguf")
    await town.start()
    await until(lambda: a.library.find("tiny"))
    kind, handler = b.server.methods["parcel"]

    async def evil(caller: str, request: Any) -> Any:
        parcel = await handler(caller, request)
        return type(parcel)(parcel.model, (Item("../../evil.gguf", 5),))

    b.server.methods["parcel"] = (kind, evil)
    with pytest.raises(PullError, match="not the file of a model"):
        await a.pull("tiny")
    assert not list(a.folder.rglob("evil*"))


async def test_through_ollama(town: Town) -> None:
    a, _, _ = town.nodes
    await town.start()
    async with Standin([Known("x:latest")]) as standin:
        a.ollama = standin.url
        lines = await a.pull("llama3.2:3b")
        assert lines[-1] == {"status": "success"}
        assert any(line.get("completed") == line.get("total") != None for line in lines)  # noqa: E711
        assert "llama3.2:3b" in standin.models
        with pytest.raises(PullError, match="does not exist") as caught:
            await a.pull("missing-one")
        assert caught.value.missing


class SlowOllama:
    """An Ollama that says one thing and then nothing until it may go on."""

    def __init__(self, says: str) -> None:
        self.says, self.go_on = says, asyncio.Event()

    async def start(self) -> str:
        app = web.Application()
        app.router.add_post("/api/pull", self._pull)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def close(self) -> None:
        await self._runner.cleanup()

    async def _pull(self, request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        await answer.write(json.dumps({"status": self.says}).encode() + b"\n")
        await self.go_on.wait()
        await answer.write(b'{"status":"success"}\n')
        return answer


async def test_an_ollama_that_says_nothing_is_given_up(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sollold.models.pull._SILENCE", 0.2)
    a, _, _ = town.nodes
    await town.start()
    ollama = SlowOllama("pulling 0123456789ab")
    a.ollama = await ollama.start()
    try:
        with pytest.raises(PullError, match="has not said a word"):
            await a.pull("llama3.2:3b")
    finally:
        await ollama.close()


async def test_an_ollama_that_checks_what_has_come_is_waited_for(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sollold.models.pull._SILENCE", 0.2)
    a, _, _ = town.nodes
    await town.start()
    ollama = SlowOllama("verifying sha256 digest")
    a.ollama = await ollama.start()
    pulling = asyncio.create_task(a.pull("llama3.2:3b"))
    try:
        await asyncio.wait({pulling}, timeout=0.6)
        ollama.go_on.set()
        assert (await pulling)[-1] == {"status": "success"}
    finally:
        await ollama.close()


async def test_nobody_has_it(town: Town) -> None:
    await town.start()
    with pytest.raises(PullError, match="no node of the cluster has nothing:latest") as caught:
        await town.nodes[0].pull("nothing")
    assert caught.value.missing
    with pytest.raises(PullError, match="not a model's name"):
        await town.nodes[0].pull("../etc")


async def test_from_the_hub(town: Town, tmp_path: Path) -> None:
    a, _, _ = town.nodes
    content = big(tmp_path / "hub.gguf").read_bytes()
    hub = HubDouble("org/Tiny-GGUF", {"Tiny-Q8_0.gguf": b"x", "Tiny-Q4_K_M.gguf": content})
    a.environ["HF_ENDPOINT"] = await hub.start()
    try:
        await town.start()
        hub.cut_after = 2
        with pytest.raises(PullError):
            await asyncio.wait_for(a.pull("hf.co/org/Tiny-GGUF:Q4_K_M"), 30)
        hub.cut_after = 1 << 30
        fetched = len(hub.ranges)
        lines = await a.pull("hf.co/org/Tiny-GGUF:Q4_K_M")
        assert lines[-1]["status"] == "success"
        assert len(hub.ranges) - fetched < -(-len(content) // PART)
        model = a.catalogue.get("hf.co/org/Tiny-GGUF:Q4_K_M")
        assert model is not None
        assert not model.unusable
        assert sole(a.catalogue.own).read_bytes() == content
        with pytest.raises(PullError, match="it has Q4_K_M, Q8_0") as caught:
            await a.pull("hf.co/org/Tiny-GGUF:Q2_K")
        assert caught.value.missing
        with pytest.raises(PullError, match="is not on") as caught:
            await a.pull("hf.co/org/Other:Q2_K")
        assert caught.value.missing
    finally:
        await hub.close()


async def test_an_adapter_alone_is_no_model(town: Town, tmp_path: Path) -> None:
    a, _, _ = town.nodes
    content = big(tmp_path / "hub.gguf").read_bytes()
    hub = HubDouble("org/Lora", {"adapter-Q8_0.gguf": content})
    a.environ["HF_ENDPOINT"] = await hub.start()
    try:
        await town.start()
        with pytest.raises(PullError, match="no model among the files"):
            await a.pull("hf.co/org/Lora:Q8_0")
    finally:
        await hub.close()


async def test_an_ollama_that_fails_leaves_the_hub(town: Town, tmp_path: Path) -> None:
    a, _, _ = town.nodes
    content = big(tmp_path / "hub.gguf").read_bytes()
    hub = HubDouble("missing/Tiny-GGUF", {"Tiny-Q8_0.gguf": content})
    a.environ["HF_ENDPOINT"] = await hub.start()
    try:
        await town.start()
        async with Standin([]) as standin:
            a.ollama = standin.url
            standin.refuses_pulls = True
            lines = await a.pull("hf.co/missing/Tiny-GGUF:Q8_0")
            assert lines[-1] == {"status": "success"}
            assert [path for path, _ in standin.requests] == ["/api/pull"]
            assert sole(a.catalogue.own).read_bytes() == content
            with pytest.raises(PullError, match="Ollama could not pull"):
                await a.pull("llama3.2:3b")
    finally:
        await hub.close()


class HubDouble:
    """Hugging Face's hub as far as it is asked."""

    def __init__(self, repository: str, files: dict[str, bytes]) -> None:
        self.repository, self.files = repository, files
        self.ranges: list[str] = []
        self.cut_after = 1 << 30

    async def start(self) -> str:
        app = web.Application()
        app.router.add_get("/api/models/{org}/{repo}", self._info)
        app.router.add_get("/{org}/{repo}/resolve/main/{file}", self._file)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def close(self) -> None:
        await self._runner.cleanup()

    async def _info(self, request: web.Request) -> web.Response:
        if f"{request.match_info['org']}/{request.match_info['repo']}" != self.repository:
            return web.Response(status=404)
        siblings = [
            {
                "rfilename": name,
                "size": len(raw),
                "lfs": {"sha256": hashlib.sha256(raw).hexdigest(), "size": len(raw), "pointerSize": 1},
            }
            for name, raw in self.files.items()
        ]
        return web.Response(text=json.dumps({"siblings": [*siblings, {"rfilename": "README.md", "size": 3}]}))

    async def _file(self, request: web.Request) -> web.Response:
        self.ranges.append(request.headers["Range"])
        if len(self.ranges) > self.cut_after:
            return web.Response(status=503)
        start, end = request.headers["Range"].removeprefix("bytes=").split("-")
        return web.Response(
            status=206, body=self.files[request.match_info["file"]][int(start) : int(end) + 1]
        )


async def test_copy_and_delete(town: Town) -> None:
    a, _, _ = town.nodes
    path = big(a.folder / "m" / "tiny.gguf")
    await town.start()
    tiny = a.catalogue.get("tiny:latest")
    assert tiny is not None
    await a.own.copy(tiny, "mine")
    copied = a.catalogue.get("mine:latest")
    assert copied is not None
    assert copied.digest == tiny.digest
    with pytest.raises(OwnError, match="there is a model"):
        await a.own.copy(tiny, "mine")
    told = Told(system="Be brief.", params='{"top_k":3}')
    await a.own.copy(tiny, "brief", told)
    brief = a.catalogue.get("brief:latest")
    assert brief is not None
    assert (brief.digest, brief.system, brief.params) == (tiny.digest, "Be brief.", '{"top_k":3}')
    assert (copied.system, copied.params) == (tiny.system, tiny.params)
    assert await a.own.delete("mine:latest")
    assert a.catalogue.get("mine:latest") is None
    assert not await a.own.delete("tiny:latest"), "what we only found is never deleted"
    assert path.exists()


async def test_a_copy_outlives_what_was_copied_where_a_link_leads_to_our_folder(town: Town) -> None:
    a, b, _ = town.nodes
    big(b.folder / "m" / "tiny.gguf")
    elsewhere = a.folder / "elsewhere"
    elsewhere.mkdir(parents=True)
    a.catalogue.own.parent.mkdir(parents=True)
    a.catalogue.own.symlink_to(elsewhere)
    await town.start()
    await until(lambda: a.library.find("tiny"))
    await a.pull("tiny")
    first = a.catalogue.get("tiny:latest")
    assert first is not None
    await a.own.copy(first, "second")
    assert await a.own.delete("tiny:latest")
    second = a.catalogue.get("second:latest")
    assert second is not None
    assert (second.unusable, second.digest) == ("", first.digest)


async def test_pulled_can_be_deleted(town: Town) -> None:
    a, b, _ = town.nodes
    big(b.folder / "m" / "tiny.gguf")
    await town.start()
    await until(lambda: a.library.find("tiny"))
    await a.pull("tiny")
    assert await a.own.delete("tiny:latest")
    assert list(a.catalogue.own.glob("*.gguf")) == []
    assert b.catalogue.models


def test_pace() -> None:
    pace = Pace(1000)
    assert pace.wait(500, 100.0) == pytest.approx(0.25)
    assert pace.wait(500, 100.0) == pytest.approx(0.75)
    assert pace.wait(10, 200.0) == 0.0
    assert Pace(0).wait(1 << 40, 1.0) == 0.0
    pace.rate = 0
    assert pace.wait(1 << 40, 200.0) == 0.0


def test_pace_of_several_threads_is_one_pace() -> None:
    pace, count = Pace(1000), 400
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            waits = list(threads.map(lambda _: pace.wait(10, 100.0), range(count)))
    finally:
        sys.setswitchinterval(before)
    assert max(waits) == pytest.approx(count * 10 / 1000 - 0.25)
    assert len({round(wait, 6) for wait in waits if wait}) == len([wait for wait in waits if wait])


def test_slow_pace_moves_small_pieces() -> None:
    assert Pace(0).piece(1 << 20) == 1 << 20
    assert Pace(10 << 20).piece(1 << 20) == 1 << 20
    assert Pace(40_000).piece(1 << 20) == 10_000
    assert Pace(1).piece(1 << 20) == 1024


def test_a_thread_that_keeps_a_pace_can_be_stopped() -> None:
    stop = Stop()
    with ThreadPoolExecutor(1) as threads:
        sleeping = threads.submit(stop.pause, 60.0)
        stop.stop()
        with pytest.raises(SourceError):
            sleeping.result(timeout=10)


async def test_a_full_disk_is_no_fault_of_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Blocking:
        name = "node b"
        taken = 0

        def take(self, index: int, start: int, end: int, write: Any, stop: Stop) -> None:
            self.taken += 1
            try:
                write(start, memoryview(bytes(end - start)))
            except OSError as error:
                raise SourceError(f"node b broke off: {error}") from None

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Landing, "write", full)
    landing = Landing(tmp_path, "a" * 32, (Item("model.gguf", 100),))
    landing.open()
    source = Blocking()
    with ThreadPoolExecutor(2) as threads:
        fill = Fill(landing, [source], Pace(0), threads, pause=0.0)
        with pytest.raises(OSError, match="No space left"):
            await fill.run()
    landing.close()
    assert source.taken == 1


def test_what_lies_beside_the_files_is_on_the_disk_before_it_is_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    fsync = os.fsync

    def told(handle: int) -> None:
        fsync(handle)
        if not (tmp_path / "x").exists():
            synced.append(os.fstat(handle).st_ino)

    landing = Landing(tmp_path, "a" * 32, (Item("x.gguf", 1),))
    landing.open()
    landing.finish_part(0, 0)
    monkeypatch.setattr(os, "fsync", told)
    place = landing.settle("x", {"card": b"content"})
    assert (place / "card").read_bytes() == b"content"
    assert {(place / "card").stat().st_ino, place.stat().st_ino} <= set(synced)


def test_what_has_come_is_counted_to_the_byte(tmp_path: Path) -> None:
    sizes = (1, 7, 8, 9, 16, 20)
    landing = Landing(tmp_path, "a" * 32, tuple(Item(f"{k}.gguf", size) for k, size in enumerate(sizes)), 8)
    landing.open()
    parts = landing.missing()
    assert landing.completed == 0
    for index, part in parts:
        before = landing.completed_of(index)
        landing.finish_part(index, part)
        start, end = landing.span(index, part)
        assert landing.completed_of(index) == before + end - start
    assert [landing.completed_of(k) for k in range(len(sizes))] == list(sizes)
    landing.forget(0, 0)
    assert landing.completed == sum(sizes) - 1
    landing.close()


def test_what_has_come_is_counted_without_going_through_the_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    landing = Landing(tmp_path, "a" * 32, (Item("big.gguf", 80),), 8)
    landing.open()
    for part in range(10):
        landing.finish_part(0, part)
    asked: list[int] = []
    monkeypatch.setattr(Landing, "span", lambda self, index, part: asked.append(part) or (0, 8))
    assert landing.completed_of(0) == 80
    assert asked == []
    landing.close()


def test_landing_that_has_no_room(tmp_path: Path) -> None:
    with pytest.raises(LandingError, match="room"):
        Landing(tmp_path, "k", (Item("a.gguf", 1 << 60),)).open()


@pytest.mark.parametrize(
    "notes", [b"", b"{", b'{"part":1,"items":[],"done":[]}', b'{"part":4,"items":[["a.gguf",8]]']
)
def test_landing_with_odd_notes_starts_anew(tmp_path: Path, notes: bytes) -> None:
    folder = tmp_path / ".parts" / "k"
    folder.mkdir(parents=True)
    (folder / "parts.json").write_bytes(notes)
    landing = Landing(tmp_path, "k", (Item("a.gguf", 8),), part=4)
    landing.open()
    assert landing.missing() == [(0, 0), (0, 1)]
    landing.close()


def test_chosen_files() -> None:
    paths = [
        "README.md",
        "m-Q8_0.gguf",
        "m-Q4_K_M.gguf",
        "mmproj-m-BF16.gguf",
        "mmproj-m-F16.gguf",
        "BF16/m-BF16-00001-of-00002.gguf",
        "BF16/m-BF16-00002-of-00002.gguf",
    ]
    assert choose(paths, "latest") == ("m-Q4_K_M.gguf", "mmproj-m-F16.gguf")
    assert choose(paths, "q8_0") == ("m-Q8_0.gguf", "mmproj-m-F16.gguf")
    assert len(choose(paths, "BF16")) == 3
    assert choose(paths[:-1], "BF16") == ()
    assert choose(paths, "Q2_K") == ()
