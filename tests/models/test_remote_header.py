"""Headers of models on the internet, read by range requests."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import pytest

from sollold.models.footprint.read_shape import shape_of
from sollold.models.gguf import reader as gguf
from sollold.models.gguf.header import GgufError
from sollold.models.transfer import remote_header
from sollold.models.transfer.internet import Internet
from sollold.models.transfer.ollama_registry import OllamaRegistry
from sollold.models.transfer.partial_file import Item
from sollold.models.transfer.remote_header import RemoteError, RemoteHeaders, on_hub
from tests.gguf.size import Size
from tests.gguf.writer import write
from tests.models.hub_double import HubDouble
from tests.models.registry_double import RegistryDouble


@pytest.fixture(autouse=True)
def small_first_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the first range request so small that a header needs several."""
    monkeypatch.setattr(remote_header, "_FIRST_BYTES", 512)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "tiny-Q4_K_M.gguf", "llama", Size(layers=3))


@pytest.fixture
def content(file: Path) -> bytes:
    return file.read_bytes()


@pytest.fixture
async def registry(content: bytes) -> AsyncIterator[tuple[RegistryDouble, RemoteHeaders]]:
    double = RegistryDouble(content)
    internet = Internet({})
    yield double, RemoteHeaders(internet, OllamaRegistry(internet, await double.start()))
    await internet.close()
    await double.close()


async def test_a_header_is_read_from_ollamas_registry(
    registry: tuple[RegistryDouble, RemoteHeaders], file: Path, content: bytes
) -> None:
    double, headers = registry
    found = await headers.read("tiny")
    header = gguf.read(file)
    assert found.shape == shape_of(header)
    assert (found.model.name, found.model.layers, found.model.architecture) == ("tiny:latest", 3, "llama")
    assert found.model.size == len(content)
    assert 0 < double.sent < len(content)
    with pytest.raises(RemoteError, match="not in Ollama's registry") as caught:
        await headers.read("tiny:70b")
    assert caught.value.missing


async def test_a_header_is_read_from_the_hub(content: bytes) -> None:
    hub = HubDouble("org/Tiny-GGUF", {"tiny-Q4_K_M.gguf": content})
    internet = Internet({"HF_ENDPOINT": await hub.start()})
    headers = RemoteHeaders(internet)
    try:
        found = await headers.read("hf.co/org/Tiny-GGUF:Q4_K_M")
        assert found.model.layers == 3 and found.model.size == len(content)
        with pytest.raises(RemoteError, match="no GGUF file for 'Q8_0'; it has Q4_K_M"):
            await headers.read("hf.co/org/Tiny-GGUF:Q8_0")
    finally:
        await internet.close()
        await hub.close()


@pytest.mark.parametrize("data", [b"", b"GGUF", b"no such thing" * 100, b"GGUF\x03\0\0\0" + b"\xff" * 4000])
async def test_invalid_headers_are_refused(data: bytes) -> None:
    hub = HubDouble("org/Odd", {"odd-Q4_0.gguf": data})
    internet = Internet({"HF_ENDPOINT": await hub.start()})
    headers = RemoteHeaders(internet)
    try:
        with pytest.raises(RemoteError):
            await headers.read("hf.co/org/Odd:Q4_0")
    finally:
        await internet.close()
        await hub.close()


async def test_unreachable_and_unsupported_registries_are_refused() -> None:
    with pytest.raises(RemoteError, match="can't be reached"):
        await RemoteHeaders(Internet({}), OllamaRegistry(Internet({}), "http://127.0.0.1:9")).read("tiny")
    with pytest.raises(RemoteError, match="neither"):
        await RemoteHeaders(Internet({})).read("example.com/a/b")


def test_a_prefix_with_the_whole_header_can_be_read(file: Path) -> None:
    data = file.read_bytes()
    whole = gguf.read(file)
    found = gguf.read_prefix(data, "x", len(data))
    assert found is not None and found.tensors == whole.tensors and found.metadata == whole.metadata
    assert gguf.read_prefix(data[:100], "x", len(data)) is None
    with pytest.raises(GgufError, match="more than the file can hold"):
        gguf.read_prefix(data[:100], "x", 100)


def test_names_of_the_hub_are_recognized() -> None:
    assert on_hub("hf.co/org/repo:Q4_0") and on_hub("https://huggingface.co/org/repo")
    assert not on_hub("llama3.1:70b") and not on_hub("///")


async def test_a_server_that_ignores_the_range_is_read_no_further_than_needed(tmp_path: Path) -> None:
    content = write(tmp_path / "m.gguf", size=Size(layers=1)).read_bytes()
    sent = 0

    class WholeFile:
        name = "mirror"
        patience = 0.0

        async def read(self, index: int, start: int, end: int) -> AsyncGenerator[bytes, None]:
            nonlocal sent
            for piece in (content, *(bytes(1 << 20) for _ in range(64))):
                sent += len(piece)
                yield piece

    header = await remote_header.fetch_header(WholeFile(), 0, Item("m.gguf", 1 << 40, ""))
    assert header.files
    assert sent <= len(content) + 5 * (1 << 20)
