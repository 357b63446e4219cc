"""Files named by path in a request are listed and linked, and never modified."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sollold.control import local_models
from sollold.control.local_models import OwnModels
from sollold.control.models import ModelService
from sollold.errors import Fault, Refusal
from tests.models.pulling import Node, ThreeNodes
from tests.models.stores import write_gguf


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    three = ThreeNodes(tmp_path)
    await three.start()
    yield three.nodes[0]
    for started in three.nodes:
        await started.close()


def service(node: Node) -> ModelService:
    return ModelService(node.library, node.view, node.calls, OwnModels(node.catalogue, node.server))


def write_state(file: Path) -> tuple[int, ...]:
    """Return the file's metadata that any write would change."""
    found = file.stat()
    return found.st_ino, found.st_nlink, found.st_mode, found.st_size, found.st_mtime_ns


def same(link: str, other: Path) -> bool:
    return Path(link).samefile(other)


async def test_a_file_is_listed_once_under_its_own_name(node: Node, tmp_path: Path) -> None:
    file = tmp_path / "elsewhere" / "Some-Model-Q4_K_M.gguf"
    write_gguf(file)
    before = write_state(file)
    name = await service(node).add_file(str(file))
    assert name == "Some-Model:Q4_K_M"
    (listed,) = [model for model in node.catalogue.models if model.name == name]
    assert same(listed.files[0], file)
    link = tmp_path / "link.gguf"
    link.symlink_to(file)
    assert await service(node).add_file(str(link)) == name
    assert len(node.catalogue.models) == 1
    await service(node).delete(name)
    assert not node.catalogue.models
    assert write_state(file) == before


async def test_an_unresponsive_file_is_refused_with_a_reason(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    back = threading.Event()
    monkeypatch.setattr(local_models, "_readable", lambda path: back.wait())
    monkeypatch.setattr(local_models, "PATIENCE", 0.05)
    try:
        with pytest.raises(Refusal) as refused:
            await service(node).add_file(str(tmp_path / "x.gguf"))
        assert f"{tmp_path} does not answer" in refused.value.message
    finally:
        back.set()


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "other", "relative"])
async def test_an_unreadable_model_is_refused_with_a_reason(node: Node, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.gguf"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "other":
        path.write_text("hello")
    with pytest.raises(Refusal) as refused:
        await service(node).add_file("x.gguf" if kind == "relative" else str(path))
    words = {"missing": "No such file", "folder": "not a file", "pipe": "not a file", "other": "not a GGUF"}
    assert words.get(kind, "absolute path") in refused.value.message
    assert refused.value.fault is Fault.BAD_REQUEST
    assert node.catalogue.models == ()
