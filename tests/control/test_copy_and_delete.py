"""Copying and deleting over three nodes: which nodes act, and which files are never touched."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sollold.control.models import ModelService
from sollold.errors import Fault, Refusal
from tests.doubles import until
from tests.models.pulling import Node, ThreeNodes, big
from tests.models.stores import OllamaStore, write_gguf


@pytest.fixture
async def three_nodes(tmp_path: Path) -> AsyncIterator[ThreeNodes]:
    three_nodes = ThreeNodes(tmp_path)
    yield three_nodes
    for node in three_nodes.nodes:
        await node.close()


def service_of(node: Node) -> ModelService:
    return ModelService(node.library, node.view, node.calls)


def exchange_records(three_nodes: ThreeNodes) -> None:
    """Exchange the nodes' records."""
    for node in three_nodes.nodes:
        node.view.others = {other.name: other.view.me for other in three_nodes.nodes if other is not node}
        node.view.tell()


def names(node: Node) -> list[str]:
    return [model.name for model in node.catalogue.models]


async def copied(three_nodes: ThreeNodes) -> None:
    """Put a file with a second name on nodes a and b."""
    a, b, _ = three_nodes.nodes
    for node in (a, b):
        write_gguf(node.folder / "m" / "tiny.gguf")
    await three_nodes.start()
    await until(lambda: len(a.library.find("tiny")) == 2)
    await service_of(a).copy("tiny", "mine")
    exchange_records(three_nodes)
    await until(lambda: len(a.library.find("mine")) == 2)


async def test_all_holders_copy_and_delete_a_model(three_nodes: ThreeNodes) -> None:
    await copied(three_nodes)
    a, b, c = three_nodes.nodes
    assert [names(node) for node in three_nodes.nodes] == [["mine:latest", "tiny:latest"]] * 2 + [[]]
    await service_of(a).delete("mine")
    assert [names(node) for node in (a, b, c)] == [["tiny:latest"]] * 2 + [[]]


async def test_a_model_is_not_deleted_through_an_alias(three_nodes: ThreeNodes) -> None:
    """The model would be lost under its name too, and the alias would remain."""
    await copied(three_nodes)
    a = three_nodes.nodes[0]
    a.library.use_aliases({"gpt-4o": "mine"})
    with pytest.raises(Refusal, match="gpt-4o is an alias of mine in the settings"):
        await service_of(a).delete("gpt-4o")
    assert names(a) == ["mine:latest", "tiny:latest"]


async def test_a_file_of_another_user_can_be_copied(
    three_nodes: ThreeNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example with ``sudo cp``: the kernel forbids hard links to files of other users."""

    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", str(target))

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    a = three_nodes.nodes[0]
    write_gguf(a.catalogue.own / "tiny.gguf")
    await three_nodes.start()
    await until(lambda: a.library.find("tiny"))
    with pytest.raises(Refusal, match="Operation not permitted"):
        await service_of(a).copy("tiny", "mine")
    monkeypatch.setattr(os, "geteuid", lambda: (a.catalogue.own / "tiny.gguf").stat().st_uid + 1)
    await service_of(a).copy("tiny", "mine")
    assert names(a) == ["mine:latest", "tiny:latest"]
    await service_of(a).delete("mine")
    assert names(a) == ["tiny:latest"]


async def test_only_the_named_nodes_copy_and_delete(three_nodes: ThreeNodes) -> None:
    await copied(three_nodes)
    a, b, _ = three_nodes.nodes
    await service_of(a).copy("tiny", "more", ["name-b"])
    assert [names(a), names(b)] == [
        ["mine:latest", "tiny:latest"],
        ["mine:latest", "more:latest", "tiny:latest"],
    ]
    await service_of(a).delete("mine", ["b"])
    assert [names(a), names(b)] == [["mine:latest", "tiny:latest"], ["more:latest", "tiny:latest"]]


async def test_absent_and_unable_nodes_are_named(three_nodes: ThreeNodes) -> None:
    await copied(three_nodes)
    a = three_nodes.nodes[0]
    with pytest.raises(Refusal, match="there is no node 'x'; nodes: name-a, name-b, name-c") as caught:
        await service_of(a).delete("mine", ["x"])
    assert caught.value.fault is Fault.NOT_FOUND
    with pytest.raises(Refusal, match="name-c can't read files of tiny:latest"):
        await service_of(a).copy("tiny", "other", ["name-a", "name-c"])
    assert names(a) == ["mine:latest", "tiny:latest"], "no node made the copy"
    with pytest.raises(Refusal, match="name-c: no model mine:latest there"):
        await service_of(a).delete("mine", ["name-c"])
    big(a.folder / "m" / "big.gguf")
    await a.catalogue.refresh()
    await until(lambda: a.library.find("big"))
    with pytest.raises(Refusal, match="name-a: a model mine:latest already exists"):
        await service_of(a).copy("big", "mine", ["name-a"])


async def test_an_inexact_name_deletes_nothing(three_nodes: ThreeNodes) -> None:
    a, b, _ = three_nodes.nodes
    write_gguf(b.folder / "m" / "x.gguf")
    await three_nodes.start()
    await until(lambda: a.library.find("x"))
    await service_of(a).copy("x", "hf.co/foo/llama3:8b")
    exchange_records(three_nodes)
    await until(lambda: a.library.find("llama3:8b"))
    for call in (service_of(a).delete("llama3:8b"), service_of(a).copy("llama3:8b", "y")):
        with pytest.raises(Refusal, match=r"did you mean hf\.co/foo/llama3:8b") as caught:
            await call
        assert caught.value.fault is Fault.NOT_FOUND
    assert "hf.co/foo/llama3:8b" in names(b)


async def test_different_content_with_the_same_name_is_kept(three_nodes: ThreeNodes) -> None:
    a, b, _ = three_nodes.nodes
    write_gguf(a.folder / "m" / "x.gguf", seed=1)
    write_gguf(b.folder / "m" / "y.gguf", seed=2)
    await three_nodes.start()
    await until(lambda: len(a.library.all()) == 2)
    await service_of(a).copy("x", "mine")
    await service_of(a).copy("y", "mine")
    exchange_records(three_nodes)
    await until(lambda: len(a.library.all()) == 4)
    (apart,) = [holding.model for holding in a.library.all() if holding.model.name.startswith("mine:latest-")]
    (holder,) = [node for node, _ in a.library.find(apart.name)]
    await service_of(a).delete(apart.name)
    left = {node.name: "mine:latest" in names(node) for node in (a, b)}
    assert left == {name: name != holder for name in ("a", "b")}
    with pytest.raises(Refusal, match="your own files are not deleted: remove its files"):
        await service_of(a).delete("x")


async def test_deleting_a_model_of_an_ollama_explains_how(three_nodes: ThreeNodes) -> None:
    a = three_nodes.nodes[0]
    OllamaStore(a.folder / "store").model("x:latest", a.folder)
    await three_nodes.start()
    await until(lambda: a.library.find("x"))
    with pytest.raises(Refusal, match="ollama rm x:latest, with OLLAMA_HOST naming the Ollama itself"):
        await service_of(a).delete("x")
