"""Whether the state folder is writable."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path
from typing import Any

import pytest

from sollold.settings.state_file import why_not_writable


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
