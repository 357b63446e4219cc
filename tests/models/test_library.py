"""The models of all nodes as one node sees them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from sollold.cluster.gossip.record import Backend, Endpoint, InOllama, State
from sollold.errors import Fault, Refusal
from sollold.models.gguf import reader
from sollold.models.library import Library
from sollold.models.listing import Merger
from sollold.models.model import Model
from sollold.models.names import Resolved, resolve
from sollold.models.node_lists import ModelList
from sollold.models.stores.catalogue import Catalogue
from sollold.models.templates.jinja import fingerprint
from sollold.settings.schema import ModelSettings
from tests.doubles import FakeView, record, until
from tests.models.fakes import FakeCalls, FakeServer
from tests.models.stores import OllamaStore, write_gguf

TOKENS = [f"token{number}" for number in range(5000)]


class Node:
    """A node with a catalogue and a library, connected to others by fakes."""

    def __init__(
        self, name: str, folder: Path, servers: dict[str, FakeServer], aliases: dict[str, str]
    ) -> None:
        self.name = name
        self.folder = folder
        self.view = FakeView(record(name))
        self.server = servers.setdefault(name, FakeServer())
        self.calls = FakeCalls(name, servers)
        settings = ModelSettings(folders=(str(folder / "m"),), ollama_stores=(str(folder / "store"),))
        self.catalogue = Catalogue(settings, folder / "state", environ={}, home=folder, interval=0.02)
        self.library = Library(self.catalogue, self.view, self.calls, self.server, aliases)

    async def start(self) -> None:
        await self.catalogue.start()
        await self.library.lists.start()

    async def close(self) -> None:
        await self.library.lists.close()
        await self.catalogue.close()

    def names(self) -> list[str]:
        return [listed.model.name for listed in self.library.all()]


class ThreeNodes:
    """Three nodes that see each other's records."""

    def __init__(self, tmp_path: Path) -> None:
        self.servers: dict[str, FakeServer] = {}
        aliases = {"gpt-4": "alpha"}
        self.nodes = [Node(name, tmp_path / name, self.servers, aliases) for name in ("a", "b", "c")]

    async def start(self) -> None:
        for node in self.nodes:
            await node.start()
            node.view.subscribe(self.spread)
        self.spread()

    def spread(self) -> None:
        for node in self.nodes:
            others = {other.name: other.view.me for other in self.nodes if other is not node}
            others = {name: record for name, record in others.items() if name not in node.calls.cut}
            if others != node.view.others:
                node.view.others = others
                node.view.tell()


@pytest.fixture
async def three(tmp_path: Path) -> AsyncIterator[ThreeNodes]:
    three = ThreeNodes(tmp_path)
    yield three
    for node in three.nodes:
        await node.close()


async def until_listed(node: Node, *names: str) -> None:
    """Wait until a node lists exactly these models."""
    await until(lambda: node.names() == list(names))


async def test_all_nodes_list_each_model_once(three: ThreeNodes, tmp_path: Path) -> None:
    a, b, c = three.nodes
    write_gguf(a.folder / "m" / "alpha-F16.gguf", seed=1)
    write_gguf(b.folder / "m" / "beta-F16.gguf", seed=2)
    OllamaStore(c.folder / "store").model("gamma:7b", tmp_path, seed=3)
    OllamaStore(c.folder / "store").model("alpha:F16", tmp_path, seed=1)
    await three.start()
    for node in three.nodes:
        await until_listed(node, "alpha:F16", "beta:F16", "gamma:7b")
        pairs = node.library.find("alpha")
        assert [name for name, _ in pairs] == ["a", "c"]
        assert pairs[0][1].files != pairs[1][1].files
        assert {model.digest for _, model in pairs} == {pairs[0][1].digest}
        assert node.library.get("gpt-4") == node.library.get("alpha:f16")


async def test_a_model_is_not_reported_missing_during_the_first_scan(
    three: ThreeNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (a, *_), proceed = three.nodes, threading.Event()
    write_gguf(a.folder / "m" / "gamma-F16.gguf", seed=3)
    read = reader.read_files

    def slow(paths: Any) -> Any:
        proceed.wait(20)
        return read(paths)

    monkeypatch.setattr(reader, "read_files", slow)
    monkeypatch.setattr("sollold.models.stores.catalogue._FIRST_SCAN_SECONDS", 0.05)
    monkeypatch.setattr("sollold.models.library._SETTLE_SECONDS", 0.05)
    try:
        await a.start()
        with pytest.raises(Refusal, match=f"not found yet; still reading .*{a.folder / 'm'}") as refused:
            await a.library.named("gamma")
        assert refused.value.fault is Fault.UNAVAILABLE and refused.value.retry_after > 0
        monkeypatch.setattr("sollold.models.library._SETTLE_SECONDS", 20.0)
        lookup = asyncio.create_task(a.library.named("gamma"))
        proceed.set()
        assert (await lookup).model.name == "gamma:F16"
    finally:
        proceed.set()


async def test_a_returning_node_has_its_models_immediately(three: ThreeNodes, tmp_path: Path) -> None:
    a, _, c = three.nodes
    write_gguf(c.folder / "m" / "gamma-F16.gguf", seed=3)
    await three.start()
    await until(lambda: a.names() == ["gamma:F16"])
    a.calls.cut.add("c")
    three.spread()
    assert a.library.find("gamma") == () and a.library.resolve("gamma").away == ("name-c",)
    a.calls.cut.clear()
    three.spread()
    assert [node for node, _ in a.library.find("gamma")] == ["c"], "immediately after the node is back"


async def test_a_resolved_name_is_cached_until_models_or_aliases_change(
    three: ThreeNodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (a, *_), lookups = three.nodes, []

    def counting(name: str, *rest: Any) -> Resolved:
        lookups.append(name)
        return resolve(name, *rest)

    write_gguf(a.folder / "m" / "alpha-F16.gguf", seed=1)
    await three.start()
    await until(lambda: a.names() == ["alpha:F16"])
    monkeypatch.setattr("sollold.models.library.resolve", counting)
    for _ in range(3):
        assert a.library.get("gpt-4") is not None and a.library.get("beta") is None
    assert sorted(lookups) == ["beta", "gpt-4"]
    a.library.use_aliases({"beta": "alpha"})
    assert a.library.get("beta") is not None and a.library.get("gpt-4") is None
    write_gguf(a.folder / "m" / "gpt-4-F16.gguf", seed=2)
    await until(lambda: a.library.get("gpt-4") is not None)


async def test_a_shape_is_fetched_once_from_a_node_with_the_model(three: ThreeNodes, tmp_path: Path) -> None:
    a, b, _ = three.nodes
    vocabulary = {"tokenizer.ggml.tokens": TOKENS, "tokenizer.ggml.token_type": [1] * len(TOKENS)}
    write_gguf(b.folder / "m" / "beta-F16.gguf", metadata=vocabulary)
    await three.start()
    await until(lambda: a.library.find("beta"))
    ((node, model),) = a.library.find("beta")
    shape = await a.library.shape(node, model)
    assert len(shape.layers) == 1
    pairs = await a.library.metadata("beta")
    assert pairs["llama.context_length"] == 4096 and pairs["tokenizer.ggml.tokens"] == []
    pairs = await a.library.metadata("beta", whole=True)
    assert pairs["tokenizer.ggml.tokens"] == TOKENS and pairs["tokenizer.ggml.token_type"] == [1] * 5000
    calls = len(a.calls.made)
    assert await a.library.shape(node, model) == shape
    assert len(a.calls.made) == calls


async def test_the_shape_of_a_corrupt_file_is_refused_with_the_reason(three: ThreeNodes) -> None:
    a, b, _ = three.nodes
    path = write_gguf(b.folder / "m" / "bad.gguf")
    path.write_bytes(path.read_bytes()[:-100])
    await three.start()
    await until(lambda: a.library.find("bad"))
    ((node, model),) = a.library.find("bad")
    assert "truncated" in model.unusable
    with pytest.raises(LookupError, match="truncated"):
        await a.library.shape(node, model)


@pytest.mark.parametrize("asks", [0, 1])
async def test_a_header_with_impossible_numbers_has_no_shape(three: ThreeNodes, asks: int) -> None:
    asking, holder = three.nodes[asks], three.nodes[1]
    keys = ("llama.attention.key_length", "llama.attention.head_count_kv")
    write_gguf(holder.folder / "m" / "odd.gguf", metadata=dict.fromkeys(keys, 2**31 - 1))
    await three.start()
    await until(lambda: asking.library.find("odd"))
    ((node, model),) = asking.library.find("odd")
    with pytest.raises(LookupError, match="the header of 'odd:latest' is damaged: k is"):
        await asking.library.shape(node, model)


async def test_new_and_removed_models_are_noticed(three: ThreeNodes) -> None:
    a, b, _ = three.nodes
    await three.start()
    assert a.names() == []
    path = write_gguf(b.folder / "m" / "new.gguf")
    await until(lambda: a.names() == ["new:latest"])
    path.unlink()
    await until(lambda: a.names() == [])


async def test_models_of_an_offline_node_are_not_listed(three: ThreeNodes) -> None:
    a, b, _ = three.nodes
    write_gguf(b.folder / "m" / "beta.gguf")
    await three.start()
    await until(lambda: a.names() == ["beta:latest"])
    a.calls.cut.add("b")
    three.spread()
    await until(lambda: a.names() == [])
    for resolved in (a.library.resolve("beta"), a.library.exact("beta:latest")):
        assert (resolved.name, resolved.away) == ("", ("name-b",))
        assert "'beta" in resolved.message and "is only on name-b, which is offline" in resolved.message
    assert a.library.resolve("gamma").away == ()
    a.calls.cut.clear()
    three.spread()
    await until(lambda: a.names() == ["beta:latest"])
    assert a.library.resolve("beta").away == ()


async def test_a_failed_fetch_of_a_list_is_retried_and_logged_once(
    three: ThreeNodes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sollold.models.node_lists._RETRY_SECONDS", 0.05)
    caplog.set_level("INFO")
    a, b, c = three.nodes
    write_gguf(b.folder / "m" / "beta.gguf")
    server = three.servers.pop("b")
    await three.start()
    await until(lambda: all(node.calls.made.count(("b", "models")) >= 3 for node in (a, c)))
    assert len([line for line in caplog.messages if "can't be fetched" in line]) == 2
    three.servers["b"] = server
    await until(lambda: a.names() == ["beta:latest"])


async def test_a_refresh_lists_new_models_of_a_node_immediately(three: ThreeNodes) -> None:
    a, b, _ = three.nodes
    scans: list[str] = []

    async def scan() -> None:
        scans.append("scanned")

    b.library.lists.sources.append(scan)
    await three.start()
    b.catalogue._interval = 3600.0
    write_gguf(b.folder / "m" / "beta.gguf")
    await a.library.lists.refresh("b")
    assert (a.names(), scans) == (["beta:latest"], ["scanned"])
    (b.folder / "m" / "beta.gguf").unlink()
    await a.library.lists.refresh("b")
    assert a.names() == []
    three.servers.pop("b")
    await a.library.lists.refresh("b")


def model(name: str, digest: str, **changes: Any) -> Model:
    return replace(Model(name, digest * 64, "folder", (f"/{digest}.gguf",), 1, 0.0), **changes)


def test_different_contents_of_a_name_get_different_names() -> None:
    listed, found = Merger().merge(
        {
            "a": (model("x:latest", "1", modified=1.0),),
            "b": (model("x:latest", "2", modified=9.0),),
            "c": (model("x:latest", "1", modified=1.0),),
        }
    )
    assert list(listed) == ["x:latest", "x:latest-22222222"]
    assert [node for node, _ in found["x:latest"]] == ["a", "c"]
    assert [node for node, _ in found["x:latest-22222222"]] == ["b"]


def test_a_usable_model_takes_precedence_over_an_unusable_one() -> None:
    listed, _ = Merger().merge(
        {"a": (model("x:latest", "1", unusable="cut off."),), "b": (model("x:latest", "2"),)}
    )
    assert listed["x:latest"].nodes == ("b",)


def test_an_unreadable_model_is_matched_by_its_manifest() -> None:
    hidden = model("x:latest", "9", files=(), manifest="9" * 64, only_ollama="its files can't be read")
    listed, found = Merger().merge({"a": (hidden,), "b": (model("x:latest", "1", manifest="9" * 64),)})
    assert listed["x:latest"].nodes == ("a", "b")
    assert listed["x:latest"].model.files
    assert [bool(model.files) for _, model in found["x:latest"]] == [False, True]


def test_names_and_manifests_of_a_content_in_ollama() -> None:
    mine = model("x:latest", "1", manifest="a" * 64, template="T", params='{"stop":["x"]}')
    unreadable = model("y:latest", "9", files=(), manifest="a" * 64, only_ollama="its files can't be read")
    file = model("x:F16", "1")
    mario = model("mario:latest", "1", manifest="b" * 64, template="T", system="You are Mario.")
    other = model("z:latest", "2", manifest="c" * 64)
    listed, _ = Merger().merge({"a": (mine, other), "b": (unreadable, file, mario)})
    expected = InOllama(("x:latest", "y:latest"), ("a" * 64,), fingerprint("T"))
    assert [listed[name].in_ollama for name in ("x:latest", "y:latest")] == [expected] * 2
    assert listed["x:F16"].in_ollama == InOllama(), "a plain file does not get the layers of another name"
    assert listed["mario:latest"].in_ollama == InOllama(("mario:latest",), ("b" * 64,), fingerprint("T"))


def test_ollamas_layers_of_a_name_take_precedence_over_a_plain_file() -> None:
    ours = model("x:latest", "1", manifest="a" * 64, template="T", messages=(("user", "hi"),))
    listed, found = Merger().merge({"a": (model("x:latest", "1"),), "b": (ours,)})
    assert (listed["x:latest"].model.template, listed["x:latest"].model.messages) == ("T", (("user", "hi"),))
    assert [model.template for _, model in found["x:latest"]] == ["T", "T"]


def test_a_model_with_an_untranslatable_template_is_left_to_ollama() -> None:
    odd = model("odd:latest", "1", manifest="a" * 64, template="{{ toTypeScriptType .Prompt }}")
    listed, found = Merger().merge(
        {"a": (odd, model("file:latest", "1")), "b": (model("other:latest", "1"),)}
    )
    assert "toTypeScriptType" in listed["odd:latest"].model.only_ollama
    assert all("toTypeScriptType" in model.only_ollama for _, model in found["odd:latest"])
    assert listed["file:latest"].model.only_ollama == listed["other:latest"].model.only_ollama == ""
    assert [model.only_ollama for _, model in found["file:latest"]] == ["", ""]


def test_an_endpoint_serves_only_names_with_its_template() -> None:
    endpoint = Endpoint("d", "x:latest", "1", Backend.LOCAL, State.READY, template=fingerprint("T"))
    assert endpoint.is_of("y:latest", "1", InOllama(template=fingerprint("T")))
    assert not endpoint.is_of("y:latest", "1", InOllama())
    assert not endpoint.is_of("x:latest", "1", InOllama(template=fingerprint("U")))


def test_a_system_text_applies_only_to_its_name() -> None:
    mario = model("mario:latest", "1", system="You are Mario.")
    _, found = Merger().merge({"a": (mario,), "b": (model("base:latest", "1"),)})
    assert [model.system for _, model in found["mario:latest"]] == ["You are Mario.", "You are Mario."]
    assert [model.system for _, model in found["base:latest"]] == ["", ""]


async def test_an_invalid_name_from_another_node_hides_no_model(three: ThreeNodes) -> None:
    a, b, _ = three.nodes
    write_gguf(b.folder / "m" / "beta-F16.gguf", seed=2)
    kind, handler = b.server.methods["models"]

    async def with_invalid_name(caller: str, request: object) -> object:
        reply = await handler(caller, request)
        assert isinstance(reply, ModelList)
        return replace(reply, models=(replace(reply.models[0], name="latest~ of/no:"), *reply.models))

    b.server.methods["models"] = (kind, with_invalid_name)
    await three.start()
    await until(lambda: a.names() == ["beta:F16"])
    assert a.library.resolve("beta").name == "beta:F16"


def test_merging_changed_lists_again_gives_the_same_as_merging_them_anew() -> None:
    random = Random(7)
    merger = Merger()
    lists: dict[str, tuple[Model, ...]] = {}

    def some_model() -> Model:
        digest, manifest = random.choice("1234"), random.choice(("", "a" * 64, "b" * 64))
        return model(
            f"{random.choice('xyz')}:latest",
            digest,
            manifest=manifest,
            files=random.choice(((f"/{digest}.gguf",), ())),
            unusable=random.choice(("", "", "cut off.")),
            since=float(random.randrange(3)),
            template=random.choice(("", "T", "{{ toTypeScriptType .Prompt }}")),
        )

    for _ in range(300):
        node = random.choice("abcd")
        change = random.randrange(4)
        if change == 0:
            lists.pop(node, None)
        elif change == 1:
            lists[node] = tuple(replace(entry) for entry in lists.get(node, ()))
        else:
            lists[node] = tuple({entry.name: entry for entry in (some_model(), some_model())}.values())
        assert merger.merge(lists) == Merger().merge(lists)


def test_entries_are_kept_while_no_model_of_theirs_changes() -> None:
    merger = Merger()
    lists = {node: (model("x:latest", "1"), model("y:latest", "2")) for node in "ab"}
    before, _ = merger.merge(lists)
    # As fetched again from the node, after its other model changed.
    lists["b"] = (model("x:latest", "1"), model("y:latest", "3"))
    after, _ = merger.merge(lists)
    assert after["x:latest"] is before["x:latest"]
    assert after["y:latest"] is not before["y:latest"]
