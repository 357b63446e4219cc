"""A worker's tensor cache is filled from its own disk or from other nodes, with verified tensors only."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from sollold.agent import cache_fill, tensor_copy
from sollold.agent.cache_fill import CacheFill, tensor_key
from sollold.agent.tensor_copy import copy_bytes
from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_client import RpcClient
from sollold.engines.commands import FillCache, WantedTensor
from sollold.engines.llamacpp import tensor_cache
from sollold.engines.llamacpp.hash_frames import HeldHash
from sollold.engines.llamacpp.tensor_cache import TensorCache
from sollold.models.model import Model
from sollold.models.transfer.download import SourceError, Stop
from sollold.models.transfer.file_digest import digest_between
from sollold.models.transfer.part_check import PartHash
from sollold.models.transfer.partial_file import Item
from sollold.models.transfer.peer_source import ModelFiles
from tests.doubles import until

DATA = bytes(range(256)) * 400
SHAPE = (10, 10, 1, 1)
TENSORS = tuple(WantedTensor(f"t{index}", 0, 1000 + index * 20_000, 20_000, 8, SHAPE) for index in range(4))
SHA = hashlib.sha256(DATA).hexdigest()


def held_hash(tensor: WantedTensor, hash: str, **other: Any) -> HeldHash:
    return replace(HeldHash(tensor.name, tensor.type, tensor.shape, 0, hash), **other)


@dataclass
class Calls(RpcClient):
    """The calls of the head and other nodes, which have ``data``."""

    data: bytes = DATA
    sha: str = ""
    parts: int = 0
    away: set[str] = field(default_factory=set)
    dies: bool = False
    old: bool = False
    """The head runs a release that only knows SHA-256."""

    async def call(self, node: str, method: str, request: Any, reply: type[Any], *, timeout: float) -> Any:
        if node in self.away:
            raise PeerError(node, "it is away", transport=True)
        if method == "parcel":
            return ModelFiles(MODEL, (Item("model.gguf", len(self.data), self.sha),))
        if self.dies:
            raise PeerError(node, "nothing listens there", transport=True)
        self.parts += 1
        with tempfile.TemporaryFile() as file:
            file.write(self.data)
            file.flush()
            digest = digest_between(
                file.fileno(), request.start, request.end, "" if self.old else request.key
            )
        return PartHash(sha256=digest) if self.old else PartHash(gmac=digest)


@dataclass
class Source:
    """The files of a node."""

    name: str
    data: bytes = DATA
    broken: bool = False
    sent: int = 0
    hang: bool = False

    def fetch_range(
        self, index: int, start: int, end: int, write: Callable[[int, memoryview], None], stop: Stop
    ) -> None:
        if self.hang:
            stop.pause(60)
        if self.broken:
            raise SourceError(f"{self.name} disconnected")
        stop.pause(0.002)
        self.sent += end - start
        write(start, memoryview(self.data[start:end]))

    def close(self) -> None:
        pass


MODEL = Model("m", "d" * 64, "folder", ("/nowhere/m.gguf",), len(DATA), 0.0)


class Bench:
    def __init__(self, folder: Path) -> None:
        self.cache = TensorCache(folder / "tensors", 1 << 30)
        opened = self.cache.make_folder("d1", 0)
        assert opened is not None
        self.worker = opened / "rpc"
        self.calls = Calls()
        self.sources: dict[str, Source] = {}
        self.fills: list[CacheFill] = []

    def fill(self, local: Path | None = None, *sources: Source) -> CacheFill:
        self.sources = {source.name: source for source in sources}
        request = FillCache("d1", "head", MODEL.digest, TENSORS, tuple(self.sources))
        model = Model("m", MODEL.digest, "folder", (str(local),), len(DATA), 0.0) if local else None
        fill = CacheFill(
            request,
            self.cache,
            model,
            self.calls,
            lambda node, digest: self.sources[node],
        )
        self.fills.append(fill)
        fill.start()
        return fill

    def found(self, name: str) -> bytes:
        file = self.worker / name
        return file.read_bytes() if file.exists() else b""


@pytest.fixture
async def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    monkeypatch.setattr(tensor_cache, "_SPARE_BYTES", 0)
    monkeypatch.setattr(tensor_copy, "CHUNK_BYTES", 3000)
    bench = Bench(tmp_path)
    yield bench
    for fill in bench.fills:
        await fill.close()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    file = tmp_path / "copy.gguf"
    file.write_bytes(DATA)
    return file


def bytes_of(tensor: WantedTensor, data: bytes = DATA) -> bytes:
    return data[tensor.start : tensor.start + tensor.size]


async def test_a_hanging_read_does_not_delay_closing(
    bench: Bench, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, release = threading.Event(), threading.Event()

    def hanging(*arguments: Any) -> None:
        reading.set()
        release.wait()

    monkeypatch.setattr(tensor_copy, "copy_and_digest", hanging)
    monkeypatch.setattr(cache_fill, "_CLOSE_SECONDS", 0.05)
    fill = bench.fill(copy)
    await asyncio.to_thread(reading.wait)
    try:
        async with asyncio.timeout(10):
            await fill.close()
    finally:
        release.set()


async def test_a_local_copy_is_offered_under_the_requested_hash(bench: Bench, copy: Path) -> None:
    fill = bench.fill(copy)
    for index, tensor in enumerate(TENSORS):
        await fill.offer(held_hash(tensor, f"{index:016x}"))
        assert bench.found(f"{index:016x}") == bytes_of(tensor)
    assert bench.calls.parts == len(TENSORS), "the head was asked for its digests"
    await fill.close()
    bench.cache.keep("d1", MODEL.digest)
    bench.cache.remove_folder("d1")
    assert bench.cache.make_folder("d1", 0) is not None
    assert bench.cache.offered("d1", MODEL.digest).keys() == {tensor_key(tensor) for tensor in TENSORS}


async def test_cached_tensors_are_not_copied_again(bench: Bench, copy: Path) -> None:
    fill = bench.fill(copy)
    await fill.offer(held_hash(TENSORS[0], "a" * 16))
    await fill.close()
    bench.cache.keep("d1", MODEL.digest)
    bench.cache.remove_folder("d1")
    bench.cache.make_folder("d1", 0)
    second = bench.fill(copy)
    await second.offer(held_hash(TENSORS[0], "a" * 16))
    await second.offer(held_hash(TENSORS[1], "b" * 16))
    assert not (bench.worker.parent / "fill" / "0").exists()
    assert bench.found("a" * 16) == bytes_of(TENSORS[0])
    assert bench.found("b" * 16) == bytes_of(TENSORS[1])


async def test_a_large_tensor_is_copied_and_verified_in_parts(
    bench: Bench, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_fill, "LARGEST", 7000)
    fill = bench.fill(copy)
    for tensor in TENSORS:
        assert await fill.offer(held_hash(tensor, tensor.name[1] * 16))
        assert bench.found(tensor.name[1] * 16) == bytes_of(tensor)
    assert bench.calls.parts == 3 * len(TENSORS)


@pytest.mark.parametrize("old", [False, True])
async def test_a_tensor_that_differs_from_the_heads_is_not_offered(
    bench: Bench, copy: Path, old: bool
) -> None:
    bench.calls.old = old
    other = bytearray(DATA)
    other[TENSORS[1].start + 5] ^= 1
    copy.write_bytes(other)  # noqa: ASYNC240
    fill = bench.fill(copy)
    for tensor in TENSORS[:3]:
        await fill.offer(held_hash(tensor, f"{tensor.name[1] * 16}"))
    assert bench.found("0" * 16) and bench.found("2" * 16) and not bench.found("1" * 16)


@pytest.mark.parametrize(
    ("name", "known"),
    [(f"blobs/sha256-{SHA}", True), (f"blobs/{SHA}", True), (SHA, False), (f"blobs/{SHA[:40]}", False)],
)
async def test_files_with_a_known_sha256_are_not_verified_again(
    bench: Bench, tmp_path: Path, name: str, known: bool
) -> None:
    """Ollama's blobs, and large files of the Hugging Face cache, have their SHA-256 as name."""
    blob, link = tmp_path / name, tmp_path / "model.gguf"
    blob.parent.mkdir(exist_ok=True)
    blob.write_bytes(DATA)
    link.symlink_to(blob)
    bench.calls.sha = SHA
    fill = bench.fill(link)
    await fill.offer(held_hash(TENSORS[0], "0" * 16))
    assert bench.found("0" * 16) == bytes_of(TENSORS[0])
    assert (bench.calls.parts == 0) == known


async def test_requests_that_differ_from_the_wanted_tensor_are_ignored(bench: Bench, copy: Path) -> None:
    fill = bench.fill(copy)
    for other in ({"type": 1}, {"shape": (5, 20, 1, 1)}, {"offset": 32}, {"name": "t9"}):
        await fill.offer(held_hash(TENSORS[0], "0" * 16, **other))
    await fill.offer(held_hash(TENSORS[0], "../../escape"))
    assert not list(bench.worker.iterdir())


async def test_several_nodes_send_parts(bench: Bench) -> None:
    head, other = Source("head"), Source("other")
    fill = bench.fill(None, head, other)
    for tensor in TENSORS:
        await fill.offer(held_hash(tensor, tensor.name[1] * 16))
        assert bench.found(tensor.name[1] * 16) == bytes_of(tensor)
    assert head.sent and other.sent
    assert head.sent + other.sent == sum(tensor.size for tensor in TENSORS)


async def test_other_nodes_replace_one_that_disconnects(bench: Bench) -> None:
    fill = bench.fill(None, Source("head", broken=True), Source("other"))
    for tensor in TENSORS:
        await fill.offer(held_hash(tensor, tensor.name[1] * 16))
        assert bench.found(tensor.name[1] * 16) == bytes_of(tensor)


async def test_wrong_data_of_a_node_is_not_offered(bench: Bench) -> None:
    fill = bench.fill(None, Source("head"), Source("other", data=bytes(len(DATA))))
    for tensor in TENSORS:
        await fill.offer(held_hash(tensor, tensor.name[1] * 16))
        assert bench.found(tensor.name[1] * 16) in (b"", bytes_of(tensor))


async def test_nothing_is_fetched_from_the_head_alone(bench: Bench) -> None:
    head = Source("head")
    bench.calls.away = {"other"}
    fill = bench.fill(None, head, Source("other"))
    await fill.offer(held_hash(TENSORS[0], "0" * 16))
    assert not head.sent and not bench.found("0" * 16)


async def test_nodes_that_send_nothing_time_out(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_fill, "PATIENCE", 0.05)
    fill = bench.fill(None, Source("head", hang=True), Source("other", hang=True))
    assert fill._task is not None
    async with asyncio.timeout(5):
        await fill.offer(held_hash(TENSORS[0], "0" * 16))
        await asyncio.wait({fill._task})
        await fill.close()
    assert fill._task.cancelled(), "the rest is not fetched in vain"
    assert not bench.found("0" * 16)


@pytest.mark.parametrize("local", [True, False])
async def test_a_dead_head_is_logged_without_an_error(
    bench: Bench, copy: Path, local: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "sollold.agent")
    bench.calls.dies = True
    fill = bench.fill(copy) if local else bench.fill(None, Source("head"), Source("other"))
    await fill.offer(held_hash(TENSORS[0], "0" * 16))
    assert not bench.found("0" * 16)
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "the worker's cache is not filled: " in caplog.text and "nothing listens there" in caplog.text


async def test_an_unreachable_head_disables_the_fill(bench: Bench, copy: Path) -> None:
    bench.calls.away = {"head"}
    fill = bench.fill(copy)
    await fill.offer(held_hash(TENSORS[0], "0" * 16))
    assert not bench.found("0" * 16)
    await until(lambda: fill._task is not None and fill._task.done())


def test_a_short_file_and_a_stopped_copy_raise(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(OSError, match="too short"):
        copy_bytes(str(copy), len(DATA) - 10, 20, tmp_path / "part", Stop())
    stopped = Stop()
    stopped.stop()
    with pytest.raises(InterruptedError):
        copy_bytes(str(copy), 0, 20, tmp_path / "part", stopped)


async def test_filling_ends_when_the_head_has_given_up_waiting(
    bench: Bench, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = bench.fill(copy)
    for index, tensor in enumerate(TENSORS):
        await first.offer(held_hash(tensor, f"{index:016x}"))
    await first.close()
    asked, go_on = threading.Event(), threading.Event()
    offered = bench.cache.offered

    def slow(*arguments: Any) -> dict[str, Path]:
        asked.set()
        go_on.wait()
        return offered(*arguments)

    monkeypatch.setattr(bench.cache, "offered", slow)
    monkeypatch.setattr(cache_fill, "PATIENCE", 0.01)
    second = bench.fill(copy)
    await asyncio.to_thread(asked.wait)
    await second.offer(held_hash(TENSORS[0], "f" * 16))
    go_on.set()
    assert second._task is not None
    await asyncio.wait({second._task})
    assert second._task.cancelled() and all(ready.done() for ready in second._files.values())


async def test_a_model_of_many_tensors_does_not_block_the_loop(bench: Bench) -> None:
    shape = (1, 1, 1, 1)
    tensors = tuple(WantedTensor(f"t{index}", 0, index, 1, 8, shape) for index in range(16_000))
    request = FillCache("d1", "head", MODEL.digest, tensors, ())
    fill = CacheFill(request, bench.cache, None, bench.calls, lambda node, digest: Source(node))
    bench.fills.append(fill)
    compared = 0

    def count(self: WantedTensor, other: object) -> bool:
        nonlocal compared
        compared += 1
        return self is other

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WantedTensor, "__eq__", count)
        fill.start()
        assert fill._task is not None
        await fill._task
    assert compared < 2 * len(tensors)
