"""Pulling models from other nodes."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from sollold.cluster.net.rpc import PeerError
from sollold.models.gguf import reader as gguf
from sollold.models.node_lists import ModelList
from sollold.models.transfer import peer_source
from sollold.models.transfer.part_check import PartDigestRequest, PartHash
from sollold.models.transfer.partial_file import Item, PartialFile
from sollold.models.transfer.peer_source import ModelFiles
from sollold.models.transfer.pull_progress import PullError
from tests.doubles import until
from tests.models.pulling import PART, ThreeNodes, big, sole, unfinished, until_completed
from tests.models.stores import OllamaStore, write_gguf
from tests.ollama_standin import Standin


async def test_a_model_is_pulled_from_a_node(three: ThreeNodes) -> None:
    a, b, _ = three.nodes
    path = big(b.folder / "m" / "tiny-F16.gguf")
    await three.start()
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
    repeated = await a.pull("tiny:F16")
    assert [line["status"] for line in repeated] == ["pulling manifest", "success"]


async def test_names_of_pulls_are_not_guessed(three: ThreeNodes) -> None:
    a, b, _ = three.nodes
    write_gguf(b.folder / "m" / "tiny-F16.gguf")
    await three.start()
    await until(lambda: a.library.find("tiny"))
    with pytest.raises(PullError, match=r"has tiny:latest.* did you mean tiny:F16\?") as caught:
        await a.pull("tiny")
    assert not caught.value.missing, "the registry can't be reached and may have it"
    async with Standin([]) as standin:
        a.ollama = standin.url
        await a.pull("tiny")
        assert list(standin.models) == ["tiny:latest"]
    assert a.catalogue.models == ()


async def test_an_alias_pulls_its_model(three: ThreeNodes) -> None:
    a, b, _ = three.nodes
    a.library._aliases["gpt-4o"] = "Tiny:F16"
    write_gguf(b.folder / "m" / "tiny-F16.gguf")
    await three.start()
    await until(lambda: a.library.find("tiny"))
    await a.pull("gpt-4o")
    assert [model.name for model in a.catalogue.models] == ["tiny:F16"]


async def test_all_layers_of_an_ollama_model_are_pulled(three: ThreeNodes, tmp_path: Path) -> None:
    a, b, _ = three.nodes
    store = OllamaStore(b.folder / "store")
    extra = [
        store.layer("system", b"You are Mario."),
        store.layer("template", b"{{ .Prompt }}"),
        store.layer("projector", write_gguf(tmp_path / "p", architecture="clip").read_bytes()),
        store.layer("adapter", write_gguf(tmp_path / "l", metadata={"general.type": "adapter"}).read_bytes()),
    ]
    store.model("mike/mario:7b", tmp_path, extra=extra)
    await three.start()
    await until(lambda: a.library.find("mike/mario:7b"))
    await a.pull("mike/mario:7b")
    pulled, source = a.catalogue.get("mike/mario:7b"), b.catalogue.get("mike/mario:7b")
    assert pulled is not None
    assert source is not None
    assert (pulled.system, pulled.template, pulled.manifest) == (
        "You are Mario.",
        "{{ .Prompt }}",
        source.manifest,
    )
    assert pulled.digest == source.digest
    assert pulled.projector
    assert len(pulled.adapters) == 1
    assert len(a.catalogue.models) == 1


async def test_a_split_model_is_pulled(three: ThreeNodes) -> None:
    a, b, _ = three.nodes
    for number in (1, 2):
        split = {"split.no": number - 1, "split.count": 2, "split.tensors.count": 80}
        names = [f"blk.{number}.t{k}.weight" for k in range(40)]
        write_gguf(b.folder / "m" / f"big-0000{number}-of-00002.gguf", metadata=split, tensors=names)
    await three.start()
    await until(lambda: a.library.find("big"))
    await a.pull("big")
    model = a.catalogue.get("big:latest")
    assert model is not None
    assert not model.unusable
    assert [Path(file).name for file in model.files] == [
        "model-00001-of-00002.gguf",
        "model-00002-of-00002.gguf",
    ]


async def test_an_aborted_pull_is_resumed_from_any_part(three: ThreeNodes) -> None:
    a, b, _ = three.nodes
    path = big(b.folder / "m" / "tiny.gguf")
    await three.start()
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
    assert b.server.asked - asked <= 2, "received parts are not fetched again"
    assert sole(a.catalogue.own).read_bytes() == path.read_bytes()


async def test_another_source_replaces_one_that_fails(three: ThreeNodes) -> None:
    a, b, c = three.nodes
    for node in (b, c):
        path = big(node.folder / "m" / "tiny.gguf")
    await three.start()
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


async def test_a_pull_without_sources_fails_and_keeps_the_received_parts(
    three: ThreeNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sollold.models.transfer.download._MAX_FAILURES", 1)
    a, b, _ = three.nodes
    big(b.folder / "m" / "tiny.gguf")
    await three.start()
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


@pytest.mark.parametrize("change", ["removed", "grown"])
async def test_a_file_that_changes_while_it_is_sent_is_reported_with_the_node(
    three: ThreeNodes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    monkeypatch.setattr("sollold.models.transfer.download._MAX_FAILURES", 1)
    monkeypatch.setattr("sollold.models.transfer.part_check._PAUSE", 0.01)
    a, b, _ = three.nodes
    path = big(b.folder / "m" / "tiny.gguf")
    await three.start()
    await until(lambda: a.library.find("tiny"))
    read = peer_source._read

    def goes(*args: Any) -> bytes:
        if b.server.asked > 3 and path.exists():
            if change == "removed":
                path.unlink()
            else:
                path.write_bytes(path.read_bytes() + b"more")
        return read(*args)

    monkeypatch.setattr(peer_source, "_read", goes)
    with pytest.raises(PullError, match="node b"):
        await a.pull("tiny")
    gc.collect()
    assert "sending" in caplog.text
    assert not [entry.getMessage() for entry in caplog.records if entry.levelno >= logging.ERROR]
    assert a.catalogue.models == () and unfinished(a)


async def test_changed_content_is_discarded(three: ThreeNodes) -> None:
    a, b, _ = three.nodes
    path = big(b.folder / "m" / "tiny.gguf", seed=1)
    await three.start()
    await until(lambda: a.library.find("tiny"))

    async def swap(request: web.Request) -> None:
        raw = bytearray(path.read_bytes())
        raw[-2000:] = b"x" * 2000
        status = path.stat()
        path.write_bytes(raw)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        b.server.fault = None

    b.server.fault = swap
    with pytest.raises(PullError, match="not what was requested"):
        await a.pull("tiny")
    assert a.catalogue.models == ()
    assert unfinished(a) == []


def alike(three: ThreeNodes) -> tuple[bytes, bytes]:
    """Write files on nodes b and c with the same sampled digest that differ in bytes all over their data.

    Returns their contents.
    """
    _, b, c = three.nodes
    names = [f"blk.0.t{k}.weight" for k in range(1000)]
    path = write_gguf(b.folder / "m" / "tiny.gguf", tensors=names)
    raw = bytearray(path.read_bytes())
    header = gguf.read(str(path))
    start = min(tensor.offset for tensor in header.tensors)
    length = len(raw) - start
    for number in range(64):
        raw[start + length * number // 64 + 8192] ^= 1
    other = c.folder / "m" / "tiny.gguf"
    other.parent.mkdir(parents=True)
    other.write_bytes(raw)
    return path.read_bytes(), bytes(raw)


async def test_files_with_the_same_sampled_digest_are_not_mixed(three: ThreeNodes) -> None:
    a, b, c = three.nodes
    first, second = alike(three)
    await three.start()
    await until(lambda: len(a.library.find("tiny")) == 2)
    await a.pull("tiny")
    assert sole(a.catalogue.own).read_bytes() == first != second
    assert b.server.asked and c.server.asked


async def test_received_parts_are_checked_again_when_the_reference_node_fails(
    three: ThreeNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sollold.models.transfer.part_check._ATTEMPTS", 1)
    a, b, _ = three.nodes
    _, second = alike(three)
    await three.start()
    await until(lambda: len(a.library.find("tiny")) == 2)

    async def dies(request: web.Request) -> None:
        if b.server.asked > 100:
            a.calls.cut.add("b")

    b.server.fault = dies
    await a.pull("tiny")
    assert sole(a.catalogue.own).read_bytes() == second


async def test_resumed_parts_are_checked_again_with_another_reference_node(three: ThreeNodes) -> None:
    a, _, _ = three.nodes
    first, second = alike(three)
    await three.start()
    await until(lambda: len(a.library.find("tiny")) == 2)
    a.calls.cut.add("c")
    stream = a.puller.pull("tiny")
    await until_completed(stream, len(first) // 2)
    await stream.aclose()
    a.calls.cut = {"b"}
    await a.pull("tiny")
    assert sole(a.catalogue.own).read_bytes() == second


async def test_a_transfer_does_not_use_the_default_executor(three: ThreeNodes) -> None:
    a, b, _ = three.nodes
    big(b.folder / "m" / "tiny.gguf")
    await three.start()
    await until(lambda: a.library.find("tiny"))
    loop = asyncio.get_running_loop()
    shared, release = ThreadPoolExecutor(1), threading.Event()
    loop.set_default_executor(shared)
    shared.submit(release.wait, 60)
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
        release.set()
    await stream.aclose()


async def test_simultaneous_pulls_share_one_transfer(three: ThreeNodes) -> None:
    a, b, _ = three.nodes
    path = big(b.folder / "m" / "tiny.gguf")
    await three.start()
    await until(lambda: a.library.find("tiny"))
    abandoned = a.puller.pull("tiny")
    assert (await anext(abandoned))["status"] == "pulling manifest"
    others = [asyncio.create_task(a.pull("tiny:latest")) for _ in range(3)]
    await asyncio.sleep(0)
    await abandoned.aclose()
    for lines in await asyncio.gather(*others):
        assert lines[-1]["status"] == "success"
    assert b.server.asked == -(-path.stat().st_size // PART)


async def test_simultaneous_pulls_of_two_names_for_one_content_transfer_it_once(three: ThreeNodes) -> None:
    a, b, _ = three.nodes
    store = OllamaStore(b.folder / "store")
    content = big(b.folder / "x.gguf").read_bytes()
    for name in ("tiny:1b", "tiny:latest"):
        store.manifest(name, [store.layer("model", content)])
    await three.start()
    await until(lambda: a.library.find("tiny:1b"))
    for lines in await asyncio.gather(a.pull("tiny:1b"), a.pull("tiny")):
        assert lines[-1]["status"] == "success"
    assert sole(a.catalogue.own).read_bytes() == content
    assert b.server.asked == -(-len(content) // PART)


async def test_a_failed_transfer_is_not_reused_while_a_slow_reader_remains(three: ThreeNodes) -> None:
    a, b, _ = three.nodes
    big(b.folder / "m" / "tiny.gguf")
    await three.start()
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


async def test_a_new_pull_waits_for_the_end_of_an_abandoned_one(
    three: ThreeNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, _ = three.nodes
    big(b.folder / "m" / "tiny.gguf")
    await three.start()
    await until(lambda: a.library.find("tiny"))
    settling, proceed = threading.Event(), threading.Event()
    calls: list[str] = []
    settle, open_files = PartialFile.settle, PartialFile.open

    def slow_settle(self: PartialFile, *arguments: Any) -> Path:
        settling.set()
        proceed.wait(30)
        calls.append("settled")
        return settle(self, *arguments)

    def recorded_open(self: PartialFile) -> None:
        calls.append("opened")
        open_files(self)

    first = a.puller.pull("tiny")
    monkeypatch.setattr(PartialFile, "settle", slow_settle)
    async for line in first:
        if line["status"] == "writing manifest":
            break
    await until(settling.is_set)
    monkeypatch.setattr(PartialFile, "open", recorded_open)
    leaving = asyncio.create_task(first.aclose())
    await asyncio.sleep(0)
    second = asyncio.create_task(a.pull("tiny"))
    for _ in range(100):
        await asyncio.sleep(0)
    proceed.set()
    await leaving
    assert (await second)[-1]["status"] == "success"
    assert calls[0] == "settled", "two transfers used the same files"
    assert sole(a.catalogue.own)


async def test_aborting_a_pull_ends_the_verification_of_its_files(
    three: ThreeNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, _ = three.nodes
    content = big(b.folder / "x.gguf").read_bytes()
    store = OllamaStore(b.folder / "store")
    store.manifest("tiny:latest", [store.layer("model", content)])
    await three.start()
    await until(lambda: a.library.find("tiny"))
    reading, proceed = threading.Event(), threading.Event()
    pread, verify = os.pread, PartialFile.verify

    def slow_pread(handle: int, size: int, offset: int) -> bytes:
        if threading.current_thread() in verifying:
            reading.set()
            proceed.wait(30)
        return pread(handle, size, offset)

    def recorded_verify(self: PartialFile, check: Any) -> None:
        verifying.append(threading.current_thread())
        verify(self, check)

    verifying: list[threading.Thread] = []
    monkeypatch.setattr(os, "pread", slow_pread)
    monkeypatch.setattr(PartialFile, "verify", recorded_verify)
    monkeypatch.setattr("sollold.models.transfer.file_digest._PIECE", 1024)
    stream = a.puller.pull("tiny")
    async for line in stream:
        if line["status"] == "verifying sha256 digest":
            break
    await until(reading.is_set)
    checked: list[str] = []

    def record_check(*_: object) -> str:
        checked.append("all was read")
        return ""

    monkeypatch.setattr("sollold.models.transfer.fetch_files.fault_of", record_check)
    leaving = asyncio.create_task(stream.aclose())
    for _ in range(20):
        await asyncio.sleep(0)
    proceed.set()
    await leaving
    assert checked == []
    assert unfinished(a), "the received parts are kept"
    monkeypatch.undo()
    assert (await a.pull("tiny"))[-1]["status"] == "success"


async def test_the_last_line_is_repeated_during_a_long_verification(
    three: ThreeNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, _ = three.nodes
    big(b.folder / "m" / "tiny.gguf")
    await three.start()
    await until(lambda: a.library.find("tiny"))
    proceed = threading.Event()
    monkeypatch.setattr(PartialFile, "verify", lambda *_: proceed.wait(30))
    monkeypatch.setattr("sollold.models.transfer.pull._REPEAT_SECONDS", 0.05)
    monkeypatch.setattr("sollold.models.transfer.pull._CHECK_SECONDS", 0.01)
    statuses: list[str] = []
    async for line in a.puller.pull("tiny"):
        statuses.append(line["status"])
        if statuses.count("verifying sha256 digest") == 3:
            proceed.set()
    assert statuses[-2:] == ["writing manifest", "success"]


async def test_a_pull_that_joins_one_restricted_to_nodes_falls_back_to_ollama(three: ThreeNodes) -> None:
    a, b, _ = three.nodes
    big(b.folder / "m" / "tiny.gguf")
    await three.start()
    await until(lambda: a.library.find("tiny"))
    kind, _ = b.server.methods["parcel"]
    requested, proceed = asyncio.Event(), asyncio.Event()

    async def fails(caller: str, request: Any) -> Any:
        requested.set()
        await proceed.wait()
        raise PeerError("b", "its disk fails", transport=False)

    b.server.methods["parcel"] = (kind, fails)
    async with Standin([]) as standin:
        a.ollama = standin.url
        restricted = a.puller.pull("tiny", nodes_only=True)
        await anext(restricted)
        await requested.wait()
        joined = asyncio.create_task(a.pull("tiny"))
        await asyncio.sleep(0)
        proceed.set()
        assert (await joined)[-1] == {"status": "success"}
        await restricted.aclose()
        assert "tiny:latest" in standin.models


async def test_file_names_from_another_node_cannot_leave_the_folder(three: ThreeNodes) -> None:
    a, b, _ = three.nodes
    big(b.folder / "m" / "tiny.gguf")
    await three.start()
    await until(lambda: a.library.find("tiny"))
    kind, handler = b.server.methods["parcel"]
    names = ["../../evil.gguf", "a\0.gguf", "a\n.gguf", "evil" * 60 + ".gguf"]

    async def evil(caller: str, request: Any) -> Any:
        parcel = await handler(caller, request)
        assert isinstance(parcel, ModelFiles)
        return ModelFiles(parcel.model, (Item(names.pop(), 5),))

    b.server.methods["parcel"] = (kind, evil)
    while names:
        with pytest.raises(PullError, match="not the file of a model"):
            await a.pull("tiny")
    assert not list(a.folder.rglob("evil*"))


@pytest.mark.parametrize(
    "lie",
    [
        {"digest": "../../../../precious"},
        {"digest": ""},
        {"size": -1},
        {"layers": 2**62},
        {"modified": float("nan")},
        {"architecture": "x" * 10_000},
        {"name": "other"},
    ],
)
async def test_facts_from_another_node_are_validated(three: ThreeNodes, lie: dict[str, Any]) -> None:
    a, b, _ = three.nodes
    big(b.folder / "m" / "tiny.gguf")
    big(b.folder / "m" / "honest.gguf", seed=1)
    kind, handler = b.server.methods["models"]

    async def lying(caller: str, request: Any) -> Any:
        reply = await handler(caller, request)
        assert isinstance(reply, ModelList)
        lies = [replace(model, **lie) if model.name == "tiny:latest" else model for model in reply.models]
        return replace(reply, models=tuple(lies))

    b.server.methods["models"] = (kind, lying)
    precious = a.folder / "precious"
    precious.mkdir(parents=True)
    await three.start()
    await until(lambda: a.library.find("honest"))
    with pytest.raises(PullError):
        await a.pull("tiny")
    assert precious.is_dir(), (
        "the digest is part of a folder's path, which is removed after a failed transfer"
    )
    assert [listed.model.name for listed in a.library.all()] == ["honest:latest"]


async def test_a_hanging_adapter_does_not_make_the_folder_of_the_weights_unresponsive(
    three: ThreeNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, b, _ = three.nodes
    big(b.folder / "m" / "tiny.gguf")
    await three.start()
    (model,) = b.catalogue.models
    adapted = replace(model, digest="0" * 64, adapters=(str(b.folder / "share" / "adapter.gguf"),))
    b.catalogue._models = (model, adapted)
    b.sender._threads._seconds = 0.1
    reachable = threading.Event()
    item = peer_source._item

    def hanging(name: str, path: str) -> Item:
        if path in adapted.adapters:
            reachable.wait(30)
        return item(name, path)

    monkeypatch.setattr(peer_source, "_item", hanging)
    try:
        with pytest.raises(PeerError, match="/share does not answer"):
            await b.sender._parcel("a", peer_source.ReadPartRequest(adapted.digest))
        files = await b.sender._parcel("a", peer_source.ReadPartRequest(model.digest))
        assert [item.name for item in files.items] == ["model.gguf"]
    finally:
        reachable.set()


async def test_a_file_that_is_no_model_is_not_sent(three: ThreeNodes, tmp_path: Path) -> None:
    """Another user of the machine may have linked a secret of the daemon into a folder of models."""
    a, b, _ = three.nodes
    secret = tmp_path / "keyring"
    secret.write_text("a secret of the daemon")
    (b.folder / "m").mkdir(parents=True)
    (b.folder / "m" / "model.gguf").symlink_to(secret)
    await three.start()
    (model,) = b.catalogue.models
    assert model.unusable and model.files
    headers = {"Range": "bytes=0-7"}
    async with a.calls.stream("b", "GET", f"/models/{model.digest}/0", headers=headers) as answer:
        assert answer.status == 404
    with pytest.raises(PeerError, match="no longer on this node"):
        await a.calls.call("b", "part", PartDigestRequest(model.digest, 0, 0, 1), PartHash, timeout=5)
