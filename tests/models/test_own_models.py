"""Copies of models under other names, and deletion of pulled models."""

from __future__ import annotations

import asyncio
import errno
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from sollold.control import local_models
from sollold.control.local_models import NameOverrides, OwnError
from sollold.models.model import Model
from sollold.models.stores.folders import CARD
from sollold.models.transfer.cleanup import sweep
from sollold.models.transfer.partial_file import OLD, PARTS, Item
from sollold.models.transfer.peer_source import items_of
from tests.doubles import until
from tests.models.pulling import ThreeNodes, big, sole
from tests.models.stores import write_gguf


async def test_models_are_copied_and_only_own_ones_deleted(three: ThreeNodes) -> None:
    a, _, _ = three.nodes
    path = big(a.folder / "m" / "tiny.gguf")
    write_gguf(a.folder / "m" / "other.gguf")
    await three.start()
    tiny, other = a.catalogue.get("tiny:latest"), a.catalogue.get("other:latest")
    assert tiny is not None
    assert other is not None
    await a.own.copy(tiny, "mine")
    copied = a.catalogue.get("mine:latest")
    assert copied is not None
    assert copied.digest == tiny.digest
    overrides = NameOverrides(system="Be brief.", params='{"top_k":3}')
    await a.own.copy(tiny, "brief", overrides)
    for taken in ("mine", "tiny"):
        with pytest.raises(OwnError, match="already exists"):
            await a.own.copy(other, taken)
    with pytest.raises(OwnError, match="already exists"):
        await a.own.copy(tiny, "brief")
    # An identical copy exists: a script can be run again.
    await a.own.copy(tiny, "mine")
    await a.own.copy(tiny, "MINE")
    await a.own.copy(tiny, "tiny:latest")
    brief = a.catalogue.get("brief:latest")
    assert brief is not None
    assert (brief.digest, brief.system, brief.params) == (tiny.digest, "Be brief.", '{"top_k":3}')
    assert (copied.system, copied.params) == (tiny.system, tiny.params)
    assert await a.own.delete("mine:latest")
    assert a.catalogue.get("mine:latest") is None
    assert not await a.own.delete("tiny:latest"), "files of the user are never deleted"
    assert path.exists()


async def test_a_copy_of_a_file_that_has_just_vanished_names_it(three: ThreeNodes) -> None:
    a, _, _ = three.nodes
    path = big(a.folder / "m" / "tiny.gguf")
    await three.start()
    tiny = a.catalogue.get("tiny:latest")
    assert tiny is not None
    path.unlink()
    with pytest.raises(OwnError, match=f"tiny:latest can't be read: No such file or directory: {path}"):
        await a.own.copy(tiny, "mine")


async def test_a_file_on_a_disk_that_does_not_respond_blocks_no_other_copy(
    three: ThreeNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, _, _ = three.nodes
    big(a.folder / "m" / "tiny.gguf")
    write_gguf(a.folder / "m" / "other.gguf")
    await three.start()
    tiny, other = a.catalogue.get("tiny:latest"), a.catalogue.get("other:latest")
    assert tiny is not None and other is not None
    hanging = threading.Event()

    def hang(model: Model) -> tuple[Item, ...]:
        if model is tiny:
            hanging.wait(60)
        return items_of(model)

    monkeypatch.setattr(local_models, "items_of", hang)
    monkeypatch.setattr(local_models, "PATIENCE", 0.05)
    try:
        async with asyncio.timeout(10):
            with pytest.raises(OwnError, match=r"tiny:latest can't be read: .* does not answer"):
                await a.own.copy(tiny, "mine")
            await a.own.copy(other, "mine")
    finally:
        hanging.set()


async def test_simultaneous_copies_to_one_name_all_succeed(three: ThreeNodes) -> None:
    a, _, _ = three.nodes
    big(a.folder / "m" / "tiny.gguf")
    await three.start()
    tiny = a.catalogue.get("tiny:latest")
    assert tiny is not None
    await asyncio.gather(*(a.own.copy(tiny, "mine") for _ in range(5)))
    changed = [NameOverrides(system=str(number)) for number in range(5)]
    await asyncio.gather(*(a.own.copy(tiny, "brief", told, replace=True) for told in changed))
    assert [(model.name, model.unusable) for model in a.catalogue.models] == [
        ("brief:latest", ""),
        ("mine:latest", ""),
        ("tiny:latest", ""),
    ]


async def test_only_own_names_can_be_replaced(three: ThreeNodes) -> None:
    """As when ``ollama create`` is repeated with an edited Modelfile."""
    a, _, _ = three.nodes
    big(a.folder / "m" / "tiny.gguf")
    await three.start()
    tiny = a.catalogue.get("tiny:latest")
    assert tiny is not None
    for system in ("one", "two"):
        await a.own.copy(tiny, "mine", NameOverrides(system=system), replace=True)
        mine = a.catalogue.get("mine:latest")
        assert mine is not None and (mine.system, mine.unusable) == (system, "")
    assert mine is not None
    await a.own.copy(mine, "mine", NameOverrides(license="MIT"), replace=True)
    replaced = a.catalogue.get("mine:latest")
    assert replaced is not None
    assert (replaced.system, replaced.license, replaced.unusable) == ("two", "MIT", "")
    with pytest.raises(OwnError, match="already exists"):
        await a.own.copy(mine, "tiny", NameOverrides(system="x"), replace=True)
    assert await a.own.delete("mine:latest")
    assert [model.name for model in a.catalogue.models] == ["tiny:latest"]


@pytest.mark.parametrize("fails", ["write_bytes", "rename"])
async def test_a_failed_copy_is_removed_and_keeps_the_old_model(
    three: ThreeNodes, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    a, _, _ = three.nodes
    big(a.folder / "m" / "tiny.gguf")
    await three.start()
    tiny = a.catalogue.get("tiny:latest")
    assert tiny is not None
    await a.own.copy(tiny, "mine", NameOverrides(system="one"))
    original = getattr(Path, fails)

    def full(path: Path, *args: Any) -> Any:
        if path.name.endswith(".new") or path.parent.name.endswith(".new"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(path, *args)

    for name in ("mine", "other"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, fails, full)
            with pytest.raises(OwnError, match="No space left"):
                await a.own.copy(tiny, name, NameOverrides(system="two"), replace=name == "mine")
    found = [path.name for path in a.catalogue.own.iterdir() if path.name != ".parts"]
    assert len(found) == 1 and found[0].startswith("mine")
    await a.catalogue.refresh()
    mine = a.catalogue.get("mine:latest")
    assert mine is not None and (mine.system, mine.unusable) == ("one", "")


async def test_a_kill_during_a_replacement_leaves_one_model(
    three: ThreeNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, _, _ = three.nodes
    big(a.folder / "m" / "tiny.gguf")
    big(a.folder / "m" / "other.gguf", seed=3)
    await three.start()
    tiny, other = a.catalogue.get("tiny:latest"), a.catalogue.get("other:latest")
    assert tiny is not None and other is not None and tiny.digest != other.digest
    await a.own.copy(tiny, "mine", NameOverrides(system="one"))

    def killed(path: Path, heir: Path) -> None:
        if path.name.endswith(OLD) and path.exists():
            raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(local_models, "merge_foreign", killed)
        with pytest.raises(RuntimeError):
            await a.own.copy(other, "mine", NameOverrides(system="two"), replace=True)
    sweep(a.catalogue.own, time.time())
    found = [path.name for path in a.catalogue.own.iterdir() if path.name != PARTS]
    assert len(found) == 1
    await a.catalogue.refresh()
    mine = a.catalogue.get("mine:latest")
    assert mine is not None and (mine.system, mine.digest) == ("two", other.digest)


async def test_a_copy_survives_its_original_if_the_own_folder_is_a_link(three: ThreeNodes) -> None:
    a, b, _ = three.nodes
    big(b.folder / "m" / "tiny.gguf")
    elsewhere = a.folder / "elsewhere"
    elsewhere.mkdir(parents=True)
    a.catalogue.own.parent.mkdir(parents=True)
    a.catalogue.own.symlink_to(elsewhere)
    await three.start()
    await until(lambda: a.library.find("tiny"))
    await a.pull("tiny")
    first = a.catalogue.get("tiny:latest")
    assert first is not None
    await a.own.copy(first, "second")
    assert await a.own.delete("tiny:latest")
    second = a.catalogue.get("second:latest")
    assert second is not None
    assert (second.unusable, second.digest) == ("", first.digest)


async def test_a_pulled_model_can_be_deleted(three: ThreeNodes) -> None:
    a, b, _ = three.nodes
    big(b.folder / "m" / "tiny.gguf")
    await three.start()
    await until(lambda: a.library.find("tiny"))
    await a.pull("tiny")
    assert await a.own.delete("tiny:latest")
    assert list(a.catalogue.own.glob("*.gguf")) == []
    assert b.catalogue.models


async def test_a_users_files_beside_a_pulled_model_are_kept(three: ThreeNodes) -> None:
    a, b, _ = three.nodes
    big(b.folder / "m" / "tiny.gguf")
    await three.start()
    await until(lambda: a.library.find("tiny"))
    await a.pull("tiny")
    folder = sole(a.catalogue.own).parent
    mine, notes = big(folder / "mine.gguf", seed=5), folder / "notes.txt"
    notes.write_text("mine")
    await a.catalogue.refresh()
    assert [model.name for model in a.catalogue.models] == ["mine:latest", "tiny:latest"]
    assert await a.own.delete("tiny:latest")
    assert sorted(folder.iterdir()) == [mine, notes]
    assert [(model.name, model.source) for model in a.catalogue.models] == [("mine:latest", "folder")]
    assert not await a.own.delete("mine:latest")


async def test_deleting_a_model_in_a_linked_folder_removes_the_link_only(
    three: ThreeNodes, tmp_path: Path
) -> None:
    a, b, _ = three.nodes
    big(b.folder / "m" / "tiny.gguf")
    await three.start()
    await until(lambda: a.library.find("tiny"))
    await a.pull("tiny")
    folder = sole(a.catalogue.own).parent
    elsewhere = folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(elsewhere)
    await a.catalogue.refresh()
    assert await a.own.delete("tiny:latest")
    assert not folder.is_symlink()
    assert (elsewhere / "model.gguf").exists()
    assert not a.catalogue.models


async def test_a_missing_file_that_the_card_names_makes_the_model_unusable(three: ThreeNodes) -> None:
    a, *_ = three.nodes
    big(a.folder / "m" / "tiny.gguf")
    write_gguf(a.folder / "m" / "mmproj-tiny.gguf", architecture="clip", metadata={"general.type": "mmproj"})
    await three.start()
    tiny = a.catalogue.get("tiny:latest")
    assert tiny is not None and "vision" in tiny.capabilities
    await a.own.copy(tiny, "mine")
    (folder,) = [path for path in a.catalogue.own.iterdir() if path.is_dir()]
    (folder / "mmproj.gguf").unlink()
    await a.catalogue.refresh()
    mine = a.catalogue.get("mine:latest")
    assert mine is not None
    assert mine.unusable == f"mmproj.gguf of the model is missing in {folder}. Pull it again."


@pytest.mark.parametrize("file", ["adapter-1.gguf", "mmproj.gguf"])
async def test_a_damaged_adapter_or_projector_makes_the_model_unusable(three: ThreeNodes, file: str) -> None:
    a, *_ = three.nodes
    big(a.folder / "m" / "tiny.gguf")
    await three.start()
    tiny = a.catalogue.get("tiny:latest")
    assert tiny is not None
    await a.own.copy(tiny, "mine")
    (folder,) = [path for path in a.catalogue.own.iterdir() if path.is_dir()]
    (folder / file).write_bytes(b"GGUF damaged")
    card = json.loads((folder / CARD).read_bytes())
    card["files"].append(file)
    card["adapters"] = [name for name in (file,) if name.startswith("adapter")]
    (folder / CARD).write_text(json.dumps(card))
    await a.catalogue.refresh()
    mine = a.catalogue.get("mine:latest")
    assert mine is not None
    assert mine.unusable.startswith(f"{folder / file} can't be used: ")
