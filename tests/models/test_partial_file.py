"""Incomplete files of a transfer."""

from __future__ import annotations

import errno
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sollold.models.transfer.download import Downloader, SourceError, Stop
from sollold.models.transfer.huggingface_hub import choose
from sollold.models.transfer.partial_file import Item, PartialFile, PartialFileError
from sollold.models.transfer.rate_limit import RateLimit
from sollold.models.transfer.verify import check_items


async def test_a_full_disk_is_not_a_failure_of_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Source:
        name = "node b"
        fetches = 0

        def fetch_range(self, index: int, start: int, end: int, write: Any, stop: Stop) -> None:
            self.fetches += 1
            try:
                write(start, memoryview(bytes(end - start)))
            except OSError as error:
                raise SourceError(f"node b broke off: {error}") from None

        def close(self) -> None:
            pass

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PartialFile, "write", full)
    partial = PartialFile(tmp_path, "a" * 32, (Item("model.gguf", 100),))
    partial.open()
    source = Source()
    with ThreadPoolExecutor(2) as threads:
        downloader = Downloader(partial, [source], RateLimit(0), threads, pause=0.0)
        with pytest.raises(OSError, match="No space left"):
            await downloader.run()
    partial.close()
    assert source.fetches == 1


def test_further_files_are_synced_before_they_are_moved_into_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    fsync = os.fsync

    def record_sync(handle: int) -> None:
        fsync(handle)
        if not (tmp_path / "x").exists():
            synced.append(os.fstat(handle).st_ino)

    partial = PartialFile(tmp_path, "a" * 32, (Item("x.gguf", 1),))
    partial.open()
    partial.finish_part(0, 0)
    monkeypatch.setattr(os, "fsync", record_sync)
    place = partial.settle("x", {"card": b"content"})
    assert (place / "card").read_bytes() == b"content"
    assert {(place / "card").stat().st_ino, place.stat().st_ino} <= set(synced)


def test_completed_bytes_are_counted_exactly(tmp_path: Path) -> None:
    sizes = (1, 7, 8, 9, 16, 20)
    partial = PartialFile(
        tmp_path, "a" * 32, tuple(Item(f"{k}.gguf", size) for k, size in enumerate(sizes)), 8
    )
    partial.open()
    parts = partial.missing()
    assert partial.completed == 0
    for index, part in parts:
        before = partial.completed_of(index)
        partial.finish_part(index, part)
        start, end = partial.span(index, part)
        assert partial.completed_of(index) == before + end - start
    assert [partial.completed_of(k) for k in range(len(sizes))] == list(sizes)
    partial.forget(0, 0)
    assert partial.completed == sum(sizes) - 1
    partial.close()


def test_completed_bytes_are_counted_without_iterating_over_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = PartialFile(tmp_path, "a" * 32, (Item("big.gguf", 80),), 8)
    partial.open()
    for part in range(10):
        partial.finish_part(0, part)
    calls: list[int] = []

    def record_span(self: PartialFile, index: int, part: int) -> tuple[int, int]:
        calls.append(part)
        return (0, 8)

    monkeypatch.setattr(PartialFile, "span", record_span)
    assert partial.completed_of(0) == 80
    assert calls == []
    partial.close()


def test_a_file_larger_than_the_free_space_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PartialFileError, match="it needs 1048576 TiB"):
        PartialFile(tmp_path, "k", (Item("a.gguf", 1 << 60),)).open()


def test_received_bytes_that_were_deleted_need_space_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = PartialFile(tmp_path, "k", (Item("a.gguf", 1 << 20),), part=1 << 20)
    partial.open()
    partial.finish_part(0, 0)
    partial.close()
    (partial.folder / "a.gguf").unlink()
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(PartialFileError, match=r"it needs 1\.00 MiB"):
        PartialFile(tmp_path, "k", (Item("a.gguf", 1 << 20),), part=1 << 20).open()


@pytest.mark.parametrize(
    "notes", [b"", b"{", b'{"part":1,"items":[],"done":[]}', b'{"part":4,"items":[["a.gguf",8]]']
)
def test_a_transfer_with_damaged_notes_starts_again(tmp_path: Path, notes: bytes) -> None:
    folder = tmp_path / ".parts" / "k"
    folder.mkdir(parents=True)
    (folder / "parts.json").write_bytes(notes)
    partial = PartialFile(tmp_path, "k", (Item("a.gguf", 8),), part=4)
    partial.open()
    assert partial.missing() == [(0, 0), (0, 1)]
    partial.close()


def test_files_of_a_hub_repository_are_chosen_by_tag() -> None:
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


def test_a_model_of_very_many_files_is_refused_at_once() -> None:
    items = tuple(Item(f"m-{k:05}-of-99999.gguf", 1) for k in range(1, 100_000))
    with pytest.raises(SourceError, match="the model has 99999 files; at most 500"):
        check_items(items)
    with pytest.raises(SourceError, match="is not the file of a model"):
        check_items((items[0], items[0]))
    check_items(items[:500])


def test_a_lack_of_space_is_reported_in_sizes_and_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=3 << 20))
    partial = PartialFile(tmp_path, "a" * 32, (Item("model.gguf", 5 << 30),))
    with pytest.raises(PartialFileError) as caught:
        partial.open()
    assert str(caught.value) == (
        f"it needs 5.00 GiB, and the disk of {tmp_path} has 3.00 MiB free; free some space there and pull it "
        "again"
    )
    assert not partial.folder.exists()
    partial.close()
