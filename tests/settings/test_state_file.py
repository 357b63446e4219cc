"""Writing of state files, and whether their folder is writable."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sollold.settings.state_file import read_json, save_json, why_not_writable, write_whole


class FileOnFullDisk:
    """A file that can be created, and whose data can't be written."""

    def __enter__(self) -> FileOnFullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def write(self, data: bytes) -> int:
        return len(data)


def test_an_unwritable_folder_is_recognized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not_writable(tmp_path) == ""
    assert not list(tmp_path.iterdir())
    assert why_not_writable(tmp_path / "gone") == "No such file or directory"

    def full(**options: Any) -> FileOnFullDisk:
        return FileOnFullDisk()

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    assert why_not_writable(tmp_path) == "No space left on device"


def test_two_threads_may_write_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, both_written = tmp_path / "kept.json", threading.Barrier(2)
    fsync = os.fsync
    files: list[int] = []

    def wait(file: int) -> None:
        if len(files) < 2:
            files.append(file)
            both_written.wait(10)
        fsync(file)

    monkeypatch.setattr(os, "fsync", wait)
    with ThreadPoolExecutor(2) as threads:
        contents = [b"a" * 10, b"b" * 20]
        list(threads.map(lambda content: write_whole(path, content), contents))
    assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_names_the_file_and_not_the_temporary_one(tmp_path: Path) -> None:
    inside = tmp_path / "gone" / "keys.json"
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (inside, folder):
        with pytest.raises(OSError, match=r"'$") as failed:
            write_whole(path, b"{}")
        assert failed.value.filename == str(path) and ".new" not in str(failed.value)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(("content", "found"), [(b"[1, 2]", [1, 2]), (b"[1, ", None), (b'["\xff"]', None)])
def test_a_damaged_file_is_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes, found: list[int] | None
) -> None:
    path = tmp_path / "numbers.json"
    assert read_json(path, list[int]) is None
    assert not caplog.text, "it is missing"
    path.write_bytes(content)
    assert read_json(path, list[int]) == found
    assert (f"{path} can't be read" in caplog.text) is (found is None)


def test_a_failure_to_write_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "cache" / "numbers.json"
    assert save_json(path, [1, 2]) and read_json(path, list[int]) == [1, 2]
    assert not save_json(path / "below.json", [3])
    assert f"{path}/below.json can't be written" in caplog.text
