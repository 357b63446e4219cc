"""Cleanup of files that an interrupted transfer left behind."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec
import pytest

from sollold.models.model import Model
from sollold.models.stores.folders import CARD
from sollold.models.transfer import cleanup
from sollold.models.transfer.cleanup import abandoned, sweep
from sollold.models.transfer.partial_file import Item, PartialFile

DAY = 86400.0
KEY = "0123456789abcdef" * 2
NOW = time.time()


def partial_file(own: Path, *, parts: int = 2) -> PartialFile:
    """A transfer of two parts, with the first ``parts`` complete."""
    partial = PartialFile(own, KEY, (Item("model.gguf", 8),), part=4, model="tiny:7b")
    partial.open()
    for part in range(parts):
        partial.write(0, 4 * part, b"good")
        partial.finish_part(0, part)
    return partial


def age(folder: Path, seconds: float) -> None:
    for path in (*folder.iterdir(), folder):
        os.utime(path, (NOW - seconds, NOW - seconds), follow_symlinks=False)


def names(folder: Path) -> Iterable[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_model_is_restored_after_an_interrupted_replacement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "tiny-0123"
    place.mkdir()
    (place / "model.gguf").write_bytes(b"old")
    card = Model("tiny:latest", "0" * 64, "own", ("model.gguf",), 0, 0.0)
    (place / CARD).write_bytes(msgspec.json.encode(card))
    partial = partial_file(tmp_path)
    rename, renamed = Path.rename, list[Path]()

    def interrupted(self: Path, target: Path) -> Path:
        if renamed:
            raise KeyboardInterrupt
        renamed.append(target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        partial.settle(place.name, {})
    monkeypatch.undo()
    assert not place.exists()
    sweep(tmp_path, NOW)
    assert (place / "model.gguf").read_bytes() == b"old"
    resumed = PartialFile(tmp_path, KEY, partial.items, part=4)
    resumed.open()
    assert resumed.missing() == [], "the received parts are kept"
    resumed.settle(place.name, {"sollold.json": b"{}"})
    assert (place / "model.gguf").read_bytes() == b"goodgood"
    assert names(place) == ["model.gguf", "sollold.json"]
    assert names(tmp_path / ".parts") == []


def test_a_failed_replacement_keeps_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "tiny-0123"
    place.mkdir()
    (place / "model.gguf").write_bytes(b"old")
    partial = partial_file(tmp_path)
    rename = Path.rename

    def full(self: Path, target: Path) -> Path:
        if self == partial.folder:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="No space"):
        partial.settle(place.name, {})
    assert (place / "model.gguf").read_bytes() == b"old"


@pytest.mark.parametrize("fails", [False, True])
def test_an_update_leaves_one_version_whenever_it_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, fails: bool
) -> None:
    older = tmp_path / "tiny-0123"
    older.mkdir()
    (older / "model.gguf").write_bytes(b"old")
    partial = partial_file(tmp_path)
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if fails and self == partial.folder:
            raise OSError(28, "No space left on device")
        moved = rename(self, target)
        assert len([name for name in names(tmp_path) if name != ".parts"]) <= 1
        return moved

    monkeypatch.setattr(Path, "rename", interrupted)
    with contextlib.suppress(OSError):
        partial.settle("tiny-4567", {}, older)
    assert names(tmp_path) == [".parts", "tiny-0123" if fails else "tiny-4567"]


def test_leftovers_are_removed_after_a_day(tmp_path: Path) -> None:
    (place := tmp_path / "tiny-0123").mkdir()
    old = tmp_path / ".parts" / f"{place.name}.old"
    linking = tmp_path / ".mine-0123456789ab.new"
    partial_file(tmp_path, parts=0).close()
    parts = tmp_path / ".parts" / KEY
    for folder in (old, linking):
        folder.mkdir()
        (folder / "model.gguf").write_bytes(b"x")
    for folder in (old, linking, parts):
        age(folder, DAY / 2)
    sweep(tmp_path, NOW)
    assert old.exists() and linking.exists() and parts.exists()
    for folder in (old, linking, parts):
        age(folder, DAY * 2)
    sweep(tmp_path, NOW)
    assert names(tmp_path) == [".parts", place.name]
    assert names(tmp_path / ".parts") == []


def test_foreign_folders_and_resumable_transfers_are_never_removed(tmp_path: Path) -> None:
    partial_file(tmp_path, parts=1).close()
    resumable = tmp_path / ".parts" / KEY
    without_notes = tmp_path / ".parts" / KEY[::-1]
    foreign = tmp_path / ".holiday.new"
    for folder in (without_notes, foreign):
        folder.mkdir()
        (folder / "photo.jpg").write_bytes(b"x")
    for folder in (resumable, without_notes, foreign):
        age(folder, DAY * 99)
    sweep(tmp_path, NOW)
    assert resumable.exists() and without_notes.exists() and foreign.exists()


def test_an_abandoned_transfer_is_reported(tmp_path: Path) -> None:
    partial_file(tmp_path, parts=1).close()
    folder = tmp_path / ".parts" / KEY
    assert abandoned(tmp_path, NOW) == []
    age(folder, DAY * 3)
    (problem,) = abandoned(tmp_path, NOW)
    assert "of tiny:7b" in problem.what
    assert problem.fix == f"sollold pull tiny:7b   (or: rm -r {folder})"
    assert abandoned(tmp_path / "none", NOW) == []


async def test_a_disk_that_does_not_respond_does_not_delay_the_doctor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = threading.Event()

    def hang(parent: Path) -> list[Path]:
        hanging.wait(60)
        return []

    monkeypatch.setattr(cleanup, "_folders", hang)
    monkeypatch.setattr(cleanup, "_DISK_SECONDS", 0.05)
    try:
        assert await cleanup.abandoned_in(tmp_path, NOW) == []
    finally:
        hanging.set()
