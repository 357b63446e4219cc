"""Names that are deleted, given or pulled while they are being pulled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from sollold.control.local_models import NameOverrides
from sollold.models.transfer.pull_progress import PullError
from tests.models.hub_double import HubDouble
from tests.models.pulling import Node, ThreeNodes, big, sole, stored_once
from tests.models.registry_double import RegistryDouble

NAME = "hf.co/org/Tiny-GGUF:Q4_K_M"


class GatedHub(HubDouble):
    """A hub that sends files only while ``gate`` is set; ``asked`` is set by a request for one."""

    def __init__(self, content: bytes) -> None:
        super().__init__("org/Tiny-GGUF", {"Tiny-Q4_K_M.gguf": content})
        self.gate, self.asked = asyncio.Event(), asyncio.Event()
        self.gate.set()

    async def _file(self, request: web.Request) -> web.Response:
        self.asked.set()
        await self.gate.wait()
        return await super()._file(request)

    def update(self, content: bytes) -> None:
        """Offer a newer version, which is not sent yet."""
        self.files["Tiny-Q4_K_M.gguf"] = content
        self.gate.clear()
        self.asked.clear()


@pytest.fixture
async def hub(three: ThreeNodes, tmp_path: Path) -> AsyncIterator[GatedHub]:
    """A hub of which node a has pulled a model that is older than the hub's now."""
    a = three.nodes[0]
    hub = GatedHub(big(tmp_path / "1.gguf", seed=1).read_bytes())
    a.environ["HF_ENDPOINT"] = await hub.start()
    await three.start()
    await a.pull(NAME)
    hub.update(big(tmp_path / "2.gguf", seed=2).read_bytes())
    yield hub
    await hub.close()


async def update(node: Node, hub: GatedHub) -> asyncio.Task[list[dict[str, object]]]:
    """Begin an update that waits for the hub."""
    updating = asyncio.create_task(node.pull(NAME))
    await hub.asked.wait()
    return updating


async def test_a_model_deleted_during_its_update_stays_deleted(three: ThreeNodes, hub: GatedHub) -> None:
    a = three.nodes[0]
    updating = await update(a, hub)
    assert await a.own.delete(NAME)
    hub.gate.set()
    with pytest.raises(PullError, match="was deleted or replaced during its update; pull it again"):
        await updating
    assert not a.catalogue.models
    ranges = len(hub.ranges)
    assert (await a.pull(NAME))[-1] == {"status": "success"}
    assert len(hub.ranges) == ranges, "what was received is kept"
    assert sole(a.catalogue.own).read_bytes() == hub.files["Tiny-Q4_K_M.gguf"]


async def test_a_model_replaced_by_its_user_during_its_update_stays(three: ThreeNodes, hub: GatedHub) -> None:
    a = three.nodes[0]
    (model,) = a.catalogue.models
    updating = await update(a, hub)
    await a.own.copy(model, NAME, NameOverrides(system="Be brief."), replace=True)
    hub.gate.set()
    with pytest.raises(PullError, match="was deleted or replaced during its update"):
        await updating
    assert [(model.name, model.system) for model in a.catalogue.models] == [(NAME, "Be brief.")]


async def test_a_copy_during_an_update_is_of_the_older_or_the_newer_version(
    three: ThreeNodes, hub: GatedHub
) -> None:
    a = three.nodes[0]
    (older,) = a.catalogue.models
    updating = await update(a, hub)
    await asyncio.gather(*(a.own.copy(older, f"copy-{k}") for k in range(4)))
    hub.gate.set()
    await updating
    found = {model.name: model for model in a.catalogue.models}
    assert found[NAME].digest != older.digest
    assert {found[f"copy-{k}:latest"].digest for k in range(4)} == {older.digest}
    assert not any(model.unusable for model in found.values())


async def test_a_name_given_during_its_first_pull_is_kept(three: ThreeNodes, hub: GatedHub) -> None:
    a = three.nodes[0]
    (model,) = a.catalogue.models
    await a.own.copy(model, "other")
    await a.own.delete(NAME)
    (model,) = a.catalogue.models
    pulling = await update(a, hub)
    await a.own.copy(model, NAME)
    hub.gate.set()
    with pytest.raises(PullError, match="was given to another model meanwhile"):
        await pulling
    assert {entry.name: entry.digest for entry in a.catalogue.models} == {
        NAME: model.digest,
        "other:latest": model.digest,
    }


async def test_two_names_of_one_manifest_are_pulled_at_once(three: ThreeNodes, tmp_path: Path) -> None:
    a = three.nodes[0]
    registry = RegistryDouble(big(tmp_path / "tiny.gguf").read_bytes())
    registry.tags.add("1b")
    a.registry.base = await registry.start()
    try:
        await three.start()
        results = await asyncio.gather(a.pull("tiny"), a.pull("tiny:1b"))
        assert [lines[-1] for lines in results] == [{"status": "success"}] * 2
        assert [(model.name, model.unusable) for model in a.catalogue.models] == [
            ("tiny:1b", ""),
            ("tiny:latest", ""),
        ]
        assert stored_once(a)
    finally:
        await registry.close()
