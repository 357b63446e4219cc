"""Files on their way: what has come, what is missing, and when they are whole."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sollold.models.transfer.download import Downloader, SourceError, Stop
from sollold.models.transfer.huggingface_hub import choose
from sollold.models.transfer.partial_file import Item, PartialFile, PartialFileError
from sollold.models.transfer.rate_limit import RateLimit


async def test_a_full_disk_is_no_fault_of_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Blocking:
        name = "node b"
        taken = 0

        def fetch_range(self, index: int, start: int, end: int, write: Any, stop: Stop) -> None:
            self.taken += 1
            try:
                write(start, memoryview(bytes(end - start)))
            except OSError as error:
                raise SourceError(f"node b broke off: {error}") from None

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PartialFile, "write", full)
    landing = PartialFile(tmp_path, "a" * 32, (Item("model.gguf", 100),))
    landing.open()
    source = Blocking()
    with ThreadPoolExecutor(2) as threads:
        fill = Downloader(landing, [source], RateLimit(0), threads, pause=0.0)
        with pytest.raises(OSError, match="No space left"):
            await fill.run()
    landing.close()
    assert source.taken == 1


def test_what_lies_beside_the_files_is_on_the_disk_before_it_is_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    fsync = os.fsync

    def told(handle: int) -> None:
        fsync(handle)
        if not (tmp_path / "x").exists():
            synced.append(os.fstat(handle).st_ino)

    landing = PartialFile(tmp_path, "a" * 32, (Item("x.gguf", 1),))
    landing.open()
    landing.finish_part(0, 0)
    monkeypatch.setattr(os, "fsync", told)
    place = landing.settle("x", {"card": b"content"})
    assert (place / "card").read_bytes() == b"content"
    assert {(place / "card").stat().st_ino, place.stat().st_ino} <= set(synced)


def test_what_has_come_is_counted_to_the_byte(tmp_path: Path) -> None:
    sizes = (1, 7, 8, 9, 16, 20)
    landing = PartialFile(
        tmp_path, "a" * 32, tuple(Item(f"{k}.gguf", size) for k, size in enumerate(sizes)), 8
    )
    landing.open()
    parts = landing.missing()
    assert landing.completed == 0
    for index, part in parts:
        before = landing.completed_of(index)
        landing.finish_part(index, part)
        start, end = landing.span(index, part)
        assert landing.completed_of(index) == before + end - start
    assert [landing.completed_of(k) for k in range(len(sizes))] == list(sizes)
    landing.forget(0, 0)
    assert landing.completed == sum(sizes) - 1
    landing.close()


def test_what_has_come_is_counted_without_going_through_the_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    landing = PartialFile(tmp_path, "a" * 32, (Item("big.gguf", 80),), 8)
    landing.open()
    for part in range(10):
        landing.finish_part(0, part)
    asked: list[int] = []
    monkeypatch.setattr(PartialFile, "span", lambda self, index, part: asked.append(part) or (0, 8))
    assert landing.completed_of(0) == 80
    assert asked == []
    landing.close()


def test_landing_that_has_no_room(tmp_path: Path) -> None:
    with pytest.raises(PartialFileError, match="room"):
        PartialFile(tmp_path, "k", (Item("a.gguf", 1 << 60),)).open()


@pytest.mark.parametrize(
    "notes", [b"", b"{", b'{"part":1,"items":[],"done":[]}', b'{"part":4,"items":[["a.gguf",8]]']
)
def test_landing_with_odd_notes_starts_anew(tmp_path: Path, notes: bytes) -> None:
    folder = tmp_path / ".parts" / "k"
    folder.mkdir(parents=True)
    (folder / "parts.json").write_bytes(notes)
    landing = PartialFile(tmp_path, "k", (Item("a.gguf", 8),), part=4)
    landing.open()
    assert landing.missing() == [(0, 0), (0, 1)]
    landing.close()


def test_chosen_files() -> None:
    paths = [
        "README.md",
        "m-Q8_0.gguf",
        "m-Q4_K_M.gguf",
        "mmproj-m-BF16.gguf",
        "mmproj-m-F16.gguf",
        "BF16/m-BF16-00001-of-00002.gguf",
        "BF16/m-BF16-00002-of-00002.gguf",
    ]
    assert choose(paths, "latest") == ("m-Q4_K_M.gguf", "mmproj-m-F16.gguf")
    assert choose(paths, "q8_0") == ("m-Q8_0.gguf", "mmproj-m-F16.gguf")
    assert len(choose(paths, "BF16")) == 3
    assert choose(paths[:-1], "BF16") == ()
    assert choose(paths, "Q2_K") == ()


def test_a_disk_without_room_is_told_in_sizes_and_nothing_is_left_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=3 << 20))
    landing = PartialFile(tmp_path, "a" * 32, (Item("model.gguf", 5 << 30),))
    with pytest.raises(PartialFileError) as told:
        landing.open()
    assert str(told.value) == (
        f"it needs 5.00 GiB, and the disk of {tmp_path} has 3.00 MiB free; free some space there and pull it "
        "again"
    )
    assert not landing.folder.exists()
    landing.close()
