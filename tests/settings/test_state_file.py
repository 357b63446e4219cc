"""Whether the state folder takes what is to be kept."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path
from typing import Any

import pytest

from sollold.settings.state_file import why_not_writable


class Full:
    """A file on a disk that is full: it can be made, and not be written."""

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def write(self, data: bytes) -> int:
        return len(data)


def test_a_folder_that_takes_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not_writable(tmp_path) == ""
    assert not list(tmp_path.iterdir())
    assert why_not_writable(tmp_path / "gone") == "No such file or directory"

    def full(**options: Any) -> Full:
        return Full()

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    assert why_not_writable(tmp_path) == "No space left on device"
