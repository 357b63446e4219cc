"""What a kill at a bad moment leaves behind, and what becomes of it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from sollold.models.transfer.cleanup import abandoned, sweep
from sollold.models.transfer.partial_file import Item, PartialFile

DAY = 86400.0
KEY = "0123456789abcdef" * 2
NOW = time.time()


def landed(own: Path, *, parts: int = 2) -> PartialFile:
    """A fetch of two parts of which some have come."""
    landing = PartialFile(own, KEY, (Item("model.gguf", 8),), part=4, model="tiny:7b")
    landing.open()
    for part in range(parts):
        landing.write(0, 4 * part, b"good")
        landing.finish_part(0, part)
    return landing


def age(folder: Path, seconds: float) -> None:
    for path in (*folder.iterdir(), folder):
        os.utime(path, (NOW - seconds, NOW - seconds), follow_symlinks=False)


def names(folder: Path) -> Iterable[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_model_that_was_being_replaced_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "tiny-0123"
    place.mkdir()
    (place / "model.gguf").write_bytes(b"old")
    landing = landed(tmp_path)
    rename, renamed = Path.rename, list[Path]()

    def killed(self: Path, target: Path) -> Path:
        if renamed:
            raise KeyboardInterrupt
        renamed.append(target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        landing.settle(place.name, {})
    monkeypatch.undo()
    assert not place.exists()
    sweep(tmp_path, NOW)
    assert (place / "model.gguf").read_bytes() == b"old"
    again = PartialFile(tmp_path, KEY, landing.items, part=4)
    again.open()
    assert again.missing() == [], "what had come is still there to be settled"
    again.settle(place.name, {"sollold.json": b"{}"})
    assert (place / "model.gguf").read_bytes() == b"goodgood"
    assert names(place) == ["model.gguf", "sollold.json"]
    assert names(tmp_path / ".parts") == []


def test_a_disk_that_fails_while_a_model_is_replaced_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "tiny-0123"
    place.mkdir()
    (place / "model.gguf").write_bytes(b"old")
    landing = landed(tmp_path)
    rename = Path.rename

    def full(self: Path, target: Path) -> Path:
        if self == landing.folder:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="No space"):
        landing.settle(place.name, {})
    assert (place / "model.gguf").read_bytes() == b"old"


def test_what_is_of_no_more_use_goes_after_a_day(tmp_path: Path) -> None:
    (place := tmp_path / "tiny-0123").mkdir()
    old = tmp_path / ".parts" / f"{place.name}.old"
    linking = tmp_path / ".mine-0123456789ab.new"
    landed(tmp_path, parts=0).close()
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


def test_what_is_not_ours_or_can_go_on_is_never_removed(tmp_path: Path) -> None:
    landed(tmp_path, parts=1).close()
    resumable = tmp_path / ".parts" / KEY
    strange = tmp_path / ".parts" / KEY[::-1]
    theirs = tmp_path / ".holiday.new"
    for folder in (strange, theirs):
        folder.mkdir()
        (folder / "photo.jpg").write_bytes(b"x")
    for folder in (resumable, strange, theirs):
        age(folder, DAY * 99)
    sweep(tmp_path, NOW)
    assert resumable.exists() and strange.exists() and theirs.exists()


def test_a_fetch_that_nobody_goes_on_with_is_told_of(tmp_path: Path) -> None:
    landed(tmp_path, parts=1).close()
    folder = tmp_path / ".parts" / KEY
    assert abandoned(tmp_path, NOW) == []
    age(folder, DAY * 3)
    (problem,) = abandoned(tmp_path, NOW)
    assert "of tiny:7b" in problem.what
    assert problem.fix == f"sollold pull tiny:7b   (or: rm -r {folder})"
    assert abandoned(tmp_path / "none", NOW) == []
