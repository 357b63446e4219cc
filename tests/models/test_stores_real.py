"""The real llama-server loads the files that the catalogue lists: blobs, and links to split blobs."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from sollold.models.footprint.run_options import Run
from sollold.models.gguf import demo_model, writer
from sollold.models.gguf.writer import NewTensor
from sollold.models.model import Model
from sollold.models.stores.catalogue import Catalogue
from sollold.models.stores.llama_support import format_fault
from sollold.settings.schema import ModelSettings
from tests.doubles import free_port
from tests.gguf.llama_run import Workers, binary, loaded
from tests.models.stores import OllamaStore

pytestmark = [
    pytest.mark.llama,
    pytest.mark.skipif(binary("llama-server") is None, reason="there is no llama-server here"),
]


@pytest.fixture
def demo_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], list[NewTensor]]:
    """Metadata and tensors of a small model that llama.cpp runs."""
    written: list[tuple[dict[str, Any], list[NewTensor]]] = []

    def record(path: str | Path, metadata: Mapping[str, Any], tensors: Sequence[NewTensor]) -> None:
        written.append((dict(metadata), list(tensors)))

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write", record)
        demo_model.write(tmp_path / "never.gguf")
    return written[0]


def file_of(path: Path, metadata: Mapping[str, Any], tensors: Sequence[NewTensor]) -> bytes:
    writer.write(path, metadata, tensors)
    return path.read_bytes()


def shard_of(path: Path, metadata: Mapping[str, Any], tensors: Sequence[NewTensor]) -> bytes:
    """As `file_of`, with the keys ``split.*`` in the types that llama.cpp requires: u16, u16 and i32."""
    raw = file_of(path, metadata, tensors)
    last = tensors[-1]
    end = raw.index(last.name.encode()) + len(last.name) + 4 + 8 * len(last.shape) + 4 + 8
    data = raw[-(-end // 32) * 32 :]
    head = raw[:end]
    for key, kind, form in (
        ("split.no", 2, "<H"),
        ("split.count", 2, "<H"),
        ("split.tensors.count", 5, "<i"),
    ):
        offset = head.index(key.encode()) + len(key)
        (value,) = struct.unpack_from("<I", head, offset + 4)
        head = head[:offset] + struct.pack("<I", kind) + struct.pack(form, value) + head[offset + 8 :]
    return head + bytes(-len(head) % 32) + data


async def found(tmp_path: Path) -> dict[str, Model]:
    settings = ModelSettings(ollama_stores=(str(tmp_path / "store"),), huggingface=False)
    catalogue = Catalogue(settings, tmp_path / "state", environ={}, home=tmp_path)
    await catalogue.start()
    await catalogue.close()
    return {model.name: model for model in catalogue.models}


def load(model: Model) -> str:
    return loaded(Path(model.files[0]), Run(context=512), Workers(()), ())


def refusal(path: str) -> str:
    """Start a llama-server that can't load the model. Returns its log."""
    program = binary("llama-server")
    assert program is not None
    command = [str(program), "-m", path, "--port", str(free_port()), "-c", "512", "-t", "1"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode != 0
    return ended.stdout + ended.stderr


async def test_a_blob_loads(tmp_path: Path, demo_content: tuple[dict[str, Any], list[NewTensor]]) -> None:
    store = OllamaStore(tmp_path / "store")
    store.manifest("demo:blob", [store.layer("model", file_of(tmp_path / "x.gguf", *demo_content))])
    model = (await found(tmp_path))["demo:blob"]
    assert not model.only_ollama
    load(model)


async def test_split_blobs_load(tmp_path: Path, demo_content: tuple[dict[str, Any], list[NewTensor]]) -> None:
    metadata, tensors = demo_content
    store = OllamaStore(tmp_path / "store")
    layers = []
    middle = len(tensors) // 2
    for number, share in enumerate((tensors[:middle], tensors[middle:])):
        split = {"split.no": number, "split.count": 2, "split.tensors.count": len(tensors)}
        header = {**(metadata if not number else {"general.architecture": "llama"}), **split}
        layers.append(store.layer("model", shard_of(tmp_path / "x.gguf", header, share)))
    store.manifest("demo:split", layers[::-1])
    model = (await found(tmp_path))["demo:split"]
    assert len(model.files) == 2
    load(model)


async def test_a_file_that_only_ollama_supports_is_refused(
    tmp_path: Path, demo_content: tuple[dict[str, Any], list[NewTensor]]
) -> None:
    metadata, tensors = demo_content
    store = OllamaStore(tmp_path / "store")
    tower = NewTensor("v.patch_embd.weight", (32, 32), 1)
    store.manifest(
        "demo:tower", [store.layer("model", file_of(tmp_path / "x.gguf", metadata, [*tensors, tower]))]
    )
    model = (await found(tmp_path))["demo:tower"]
    assert "v.patch_embd.weight" in model.only_ollama
    assert "wrong number of tensors" in format_fault(refusal(model.files[0]))
