"""A pull of a model that is present updates it, here and where nodes have the same version."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sollold.control.ollama_relay import OllamaRelay
from sollold.engines.ollama.created_models import CreatedModels
from sollold.engines.ollama.service import LocalOllama
from sollold.models.model import Model
from sollold.models.stores.folders import CARD
from tests.doubles import until
from tests.models.hub_double import HubDouble
from tests.models.pulling import Node, ThreeNodes, big, sole, stored_once
from tests.models.registry_double import RegistryDouble
from tests.models.stores import OllamaStore, hub_file, hub_repository
from tests.ollama_standin import Known, Standin

NAME = "llama3.2:3b"


class OllamaOf(LocalOllama):
    """A double of what a node knows of its Ollama."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.created = CreatedModels(node.folder / "created.json")

    @property
    def url_of_api(self) -> str:
        return self.node.ollama

    def has(self, name: str) -> bool:
        return name in self.node.in_ollama


class Registry:
    """Ollamas whose pulls fetch the newest version of a model into their stores."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.version = 1

    def put(self, node: Node) -> None:
        """Put the newest version into a node's store."""
        store = OllamaStore(node.folder / "store")
        content = big(self.folder / "newest.gguf", seed=self.version).read_bytes()
        store.manifest(NAME, [store.layer("model", content)])

    async def serve(self, node: Node) -> Standin:
        """Start an Ollama that has the newest version of the model, on the store of ``node``."""
        self.put(node)
        standin = Standin([Known(NAME)])
        standin.on_pull = lambda name: self.put(node)
        node.ollama = await standin.start()
        node.in_ollama.add(NAME)

        async def learn(other: str) -> None:
            raise NotImplementedError

        OllamaRelay(OllamaOf(node), node.view, node.calls, learn).register(node.server)
        return standin


@pytest.fixture
async def two(three: ThreeNodes, tmp_path: Path) -> AsyncIterator[tuple[Registry, list[Standin]]]:
    """Ollamas with the same version of a model on the nodes a and b; c has none."""
    registry = Registry(tmp_path)
    standins = [await registry.serve(node) for node in three.nodes[:2]]
    await three.start()
    await until(lambda: len(three.nodes[0].library.find(NAME)) == 2)
    yield registry, standins
    for standin in standins:
        await standin.close()


def content(node: Node, asked: Node) -> Model:
    """The model on ``node`` as ``asked`` knows it."""
    (model,) = asked.library.lists.of(node.name)
    return model


async def test_a_pull_updates_all_copies_of_the_same_version(
    three: ThreeNodes, two: tuple[Registry, list[Standin]]
) -> None:
    a, b, _ = three.nodes
    registry, _ = two
    old = content(a, a)
    registry.version = 2
    lines = await a.pull("llama3.2:3b")
    assert lines[-1] == {"status": "success"}
    assert any(line["status"].startswith("node b: pulling") and line.get("total") for line in lines)
    new = content(a, a)
    assert new.digest != old.digest
    assert content(b, a).digest == new.digest
    (listed,) = a.library.all()
    assert (listed.model.name, listed.nodes) == (NAME, ("a", "b"))


async def test_a_pull_of_the_newest_version_asks_no_other_node(
    three: ThreeNodes, two: tuple[Registry, list[Standin]]
) -> None:
    a = three.nodes[0]
    _, (_, other) = two
    assert (await a.pull(NAME))[-1] == {"status": "success"}
    assert not other.requests


async def test_a_pull_for_nodes_only_updates_nothing(
    three: ThreeNodes, two: tuple[Registry, list[Standin]]
) -> None:
    a = three.nodes[0]
    _, standins = two
    async for _ in a.puller.pull(NAME, nodes_only=True):
        pass
    assert not any(standin.requests for standin in standins)


async def test_other_content_under_the_name_is_left_alone(
    three: ThreeNodes, two: tuple[Registry, list[Standin]]
) -> None:
    a, b, _ = three.nodes
    registry, (_, other) = two
    registry.version = 3
    registry.put(b)
    await a.library.lists.refresh("b")
    assert content(b, a).digest != content(a, a).digest
    registry.version = 2
    assert (await a.pull(NAME))[-1] == {"status": "success"}
    assert not other.requests


async def test_the_present_version_stays_if_no_newer_one_can_be_obtained(
    three: ThreeNodes, two: tuple[Registry, list[Standin]]
) -> None:
    a = three.nodes[0]
    _, (own, _) = two
    own.refuses_pulls = True
    assert [line["status"] for line in await a.pull(NAME)][-1] == "success"
    await own.close()
    statuses = [line["status"] for line in await a.pull(NAME)]
    assert statuses[-1] == "success"
    assert any(status.startswith("the present version stays: ") for status in statuses)


async def test_a_node_whose_copy_stays_older_is_named(
    three: ThreeNodes, two: tuple[Registry, list[Standin]]
) -> None:
    a, _, c = three.nodes
    registry, (_, other) = two
    await c.pull(NAME)
    await a.library.lists.refresh("c")
    assert len(a.library.find(NAME)) == 3
    await other.close()
    registry.version = 2
    statuses = [line["status"] for line in await a.pull(NAME)]
    assert statuses[-1] == "success"
    assert any(status.startswith("node b could not update it: ") for status in statuses)
    assert "node c still has the older version: delete it there and pull it again" in statuses


HUB_NAME = "hf.co/org/Tiny-GGUF:Q4_K_M"


async def test_a_newer_version_on_the_hub_replaces_the_pulled_one(three: ThreeNodes, tmp_path: Path) -> None:
    a, b, _ = three.nodes
    first, second = (big(tmp_path / f"{seed}.gguf", seed=seed).read_bytes() for seed in (1, 2))
    hub = HubDouble("org/Tiny-GGUF", {"Tiny-Q4_K_M.gguf": first})
    a.environ["HF_ENDPOINT"] = await hub.start()
    try:
        await three.start()
        await a.pull(HUB_NAME)
        await b.library.lists.refresh("a")
        await b.pull(HUB_NAME)
        await a.library.lists.refresh("b")
        requests = len(hub.ranges)
        assert [line["status"] for line in await a.pull(HUB_NAME)] == ["pulling manifest", "success"]
        assert len(hub.ranges) == requests
        hub.files["Tiny-Q4_K_M.gguf"] = second
        statuses = [line["status"] for line in await a.pull(HUB_NAME)]
        assert "node b still has the older version: delete it there and pull it again" in statuses
        assert sole(a.catalogue.own).read_bytes() == second
        (model,) = a.catalogue.models
        assert model.name == HUB_NAME
    finally:
        await hub.close()
    statuses = [line["status"] for line in await a.pull(HUB_NAME)]
    assert statuses[1].startswith("the present version stays: ")
    assert statuses[-1] == "success"


async def test_an_update_replaces_a_model_whose_folder_the_user_moved_to_another_disk(
    three: ThreeNodes, tmp_path: Path
) -> None:
    a, *_ = three.nodes
    first, second = (big(tmp_path / f"{seed}.gguf", seed=seed).read_bytes() for seed in (1, 2))
    hub = HubDouble("org/Tiny-GGUF", {"Tiny-Q4_K_M.gguf": first})
    a.environ["HF_ENDPOINT"] = await hub.start()
    try:
        await three.start()
        await a.pull(HUB_NAME)
        folder = sole(a.catalogue.own).parent
        elsewhere = folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(elsewhere)
        await a.catalogue.refresh()
        hub.files["Tiny-Q4_K_M.gguf"] = second
        assert (await a.pull(HUB_NAME))[-1] == {"status": "success"}
        assert sole(a.catalogue.own).read_bytes() == second
        assert sole(elsewhere).read_bytes() == first
        (model,) = a.catalogue.models
        assert model.name == HUB_NAME
    finally:
        await hub.close()


async def test_an_update_leaves_a_model_alone_that_the_user_moved_among_others(
    three: ThreeNodes, tmp_path: Path
) -> None:
    a, *_ = three.nodes
    hub = HubDouble("org/Tiny-GGUF", {"Tiny-Q4_K_M.gguf": big(tmp_path / "1.gguf", seed=1).read_bytes()})
    a.environ["HF_ENDPOINT"] = await hub.start()
    try:
        await three.start()
        await a.pull(HUB_NAME)
        own = a.catalogue.own
        for file in list(sole(own).parent.iterdir()):
            file.rename(own / file.name)
        await a.catalogue.refresh()
        hub.files["Tiny-Q4_K_M.gguf"] = big(tmp_path / "2.gguf", seed=2).read_bytes()
        statuses = [line["status"] for line in await a.pull(HUB_NAME)]
        assert f"the present version stays: {own} is not the folder of a pull" in statuses
        assert a.catalogue.get(HUB_NAME)
    finally:
        await hub.close()


async def test_a_copy_of_a_registry_model_from_another_node_is_updated(
    three: ThreeNodes, tmp_path: Path
) -> None:
    a, b, _ = three.nodes
    content = big(tmp_path / "tiny.gguf").read_bytes()
    registry = RegistryDouble(content, system="Be brief.")
    a.registry.base = b.registry.base = await registry.start()
    try:
        await three.start()
        await a.pull("tiny")
        await b.library.lists.refresh("a")
        await b.pull("tiny")
        await a.library.lists.refresh("b")
        sent = registry.sent
        assert [line["status"] for line in await b.pull("tiny")] == ["pulling manifest", "success"]
        assert registry.sent == sent
        registry.put(content, system="Be verbose.")
        statuses = [line["status"] for line in await b.pull("tiny")]
        assert "node a still has the older version: delete it there and pull it again" in statuses
        assert [model.system for model in b.catalogue.models] == ["Be verbose."]
        again = [line["status"] for line in await b.pull("tiny")]
        assert any(status.startswith("node a has another version") for status in again)
    finally:
        await registry.close()


async def test_a_copy_from_another_node_is_updated_though_the_newer_version_has_its_size(
    three: ThreeNodes, tmp_path: Path
) -> None:
    a, b, _ = three.nodes
    first, second = (big(tmp_path / f"{seed}.gguf", seed=seed).read_bytes() for seed in (1, 2))
    assert len(first) == len(second)
    hub = HubDouble("org/Tiny-GGUF", {"Tiny-Q4_K_M.gguf": first})
    a.environ["HF_ENDPOINT"] = b.environ["HF_ENDPOINT"] = await hub.start()
    try:
        await three.start()
        await a.pull(HUB_NAME)
        await b.library.lists.refresh("a")
        await b.pull(HUB_NAME)
        requests = len(hub.ranges)
        assert await b.pull(HUB_NAME) == [{"status": "pulling manifest"}, {"status": "success"}]
        assert len(hub.ranges) == requests
        hub.files["Tiny-Q4_K_M.gguf"] = second
        assert (await b.pull(HUB_NAME))[-1] == {"status": "success"}
        assert sole(b.catalogue.own).read_bytes() == second
    finally:
        await hub.close()


@pytest.mark.parametrize("same_size", [True, False])
async def test_the_first_pull_gets_the_newest_version_though_a_node_has_an_older_one(
    three: ThreeNodes, tmp_path: Path, same_size: bool
) -> None:
    a, b, _ = three.nodes
    hub = HubDouble("org/Tiny-GGUF", {"Tiny-Q4_K_M.gguf": big(tmp_path / "1.gguf").read_bytes()})
    a.environ["HF_ENDPOINT"] = b.environ["HF_ENDPOINT"] = await hub.start()
    changed = {} if same_size else {"general.description": "corrected"}
    newest = big(tmp_path / "2.gguf", seed=2, metadata=changed).read_bytes()
    try:
        await three.start()
        await a.pull(HUB_NAME)
        await b.library.lists.refresh("a")
        hub.files["Tiny-Q4_K_M.gguf"] = newest
        statuses = [line["status"] for line in await b.pull(HUB_NAME)]
        assert sole(b.catalogue.own).read_bytes() == newest
        assert "node a still has the older version: delete it there and pull it again" in statuses
    finally:
        await hub.close()


async def test_a_copy_of_the_newest_version_comes_from_a_node_also_without_internet(
    three: ThreeNodes, tmp_path: Path
) -> None:
    a, b, c = three.nodes
    hub = HubDouble("org/Tiny-GGUF", {"Tiny-Q4_K_M.gguf": big(tmp_path / "1.gguf").read_bytes()})
    for node in three.nodes:
        node.environ["HF_ENDPOINT"] = await hub.start() if node is a else a.environ["HF_ENDPOINT"]
    try:
        await three.start()
        await a.pull(HUB_NAME)
        for node in (b, c):
            await node.library.lists.refresh("a")
        requests = len(hub.ranges)
        assert (await b.pull(HUB_NAME))[-1] == {"status": "success"}
        assert len(hub.ranges) == requests
    finally:
        await hub.close()
    statuses = [line["status"] for line in await c.pull(HUB_NAME)]
    assert statuses[-1] == "success"
    assert any(status.startswith("it is unknown whether there is a newer version") for status in statuses)


async def test_two_tags_of_the_same_files_are_stored_once(three: ThreeNodes, tmp_path: Path) -> None:
    a, *_ = three.nodes
    files = {"Tiny-Q4_K_M.gguf": big(tmp_path / "1.gguf").read_bytes()}
    hub = HubDouble("org/Tiny-GGUF", files)
    a.environ["HF_ENDPOINT"] = await hub.start()
    try:
        await three.start()
        await a.pull(HUB_NAME)
        requests = len(hub.ranges)
        assert (await a.pull("hf.co/org/Tiny-GGUF"))[-1] == {"status": "success"}
        assert len(hub.ranges) == requests
        assert stored_once(a)
        files["Tiny-Q4_K_M.gguf"] = big(tmp_path / "2.gguf", seed=2).read_bytes()
        await a.pull(HUB_NAME)
        await a.pull("hf.co/org/Tiny-GGUF")
        assert stored_once(a)
        left = {path.read_bytes() for path in a.catalogue.own.glob("*/*.gguf")}
        assert left == {files["Tiny-Q4_K_M.gguf"]}
    finally:
        await hub.close()


async def test_a_copy_without_a_known_version_is_compared_with_the_hub_only_once(
    three: ThreeNodes, tmp_path: Path
) -> None:
    a, *_ = three.nodes
    hub = HubDouble("org/Tiny-GGUF", {"Tiny-Q4_K_M.gguf": big(tmp_path / "1.gguf").read_bytes()})
    a.environ["HF_ENDPOINT"] = await hub.start()
    try:
        await three.start()
        await a.pull(HUB_NAME)
        card = sole(a.catalogue.own).with_name(CARD)
        card.write_bytes(card.read_bytes().replace(a.catalogue.models[0].version.encode(), b"0" * 64))
        await a.catalogue.refresh()
        requests = len(hub.ranges)
        assert {"status": "verifying sha256 digest"} in await a.pull(HUB_NAME)
        assert await a.pull(HUB_NAME) == [{"status": "pulling manifest"}, {"status": "success"}]
        assert len(hub.ranges) == requests
    finally:
        await hub.close()


async def test_another_case_of_the_name_downloads_nothing_again(three: ThreeNodes, tmp_path: Path) -> None:
    a, *_ = three.nodes
    hub = HubDouble("org/Tiny-GGUF", {"Tiny-Q4_K_M.gguf": big(tmp_path / "1.gguf").read_bytes()})
    a.environ["HF_ENDPOINT"] = await hub.start()
    try:
        await three.start()
        await a.pull(HUB_NAME)
        requests = len(hub.ranges)
        assert (await a.pull(HUB_NAME.lower()))[-1] == {"status": "success"}
        assert len(hub.ranges) == requests
        assert [model.name for model in a.catalogue.models] == [HUB_NAME]
    finally:
        await hub.close()


async def test_a_second_name_of_a_pulled_model_is_not_replaced(three: ThreeNodes, tmp_path: Path) -> None:
    a, b, _ = three.nodes
    content = big(tmp_path / "tiny.gguf").read_bytes()
    registry = RegistryDouble(content)
    a.registry.base = b.registry.base = await registry.start()
    try:
        await three.start()
        await a.pull("tiny")
        (pulled,) = a.catalogue.models
        await a.own.copy(pulled, "named")
        await b.library.lists.refresh("a")
        await b.pull("named")
        for node in (a, b):
            statuses = [line["status"] for line in await node.pull("named")]
            assert any(status.startswith("the present version stays: it was named so") for status in statuses)
    finally:
        await registry.close()


async def test_a_pull_says_that_it_does_not_update_the_users_files(three: ThreeNodes, tmp_path: Path) -> None:
    a, *_ = three.nodes
    snapshot = hub_repository(a.folder / ".cache/huggingface/hub", "org/Tiny-GGUF")
    hub_file(snapshot, "Tiny-Q4_K_M.gguf", big(tmp_path / "1.gguf").read_bytes())
    await three.start()
    statuses = [line["status"] for line in await a.pull(HUB_NAME)]
    assert statuses[1:] == [f"the present version stays: {snapshot} is not changed by a pull", "success"]
