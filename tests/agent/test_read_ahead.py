"""Files are read ahead of a worker, and not too far."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sollold.agent.read_ahead import ReadAhead


@pytest.fixture
def advised(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that the system was told of, in order."""
    told: list[str] = []

    def fadvise(handle: int, start: int, length: int, advice: int) -> None:
        assert (start, length, advice) == (0, 0, os.POSIX_FADV_WILLNEED)
        told.append(Path(f"/proc/self/fd/{handle}").readlink().name)

    monkeypatch.setattr(os, "posix_fadvise", fadvise)
    return told


def files(folder: Path) -> dict[str, Path]:
    made = {}
    for name in "abcdef":
        made[f"tensor {name}"] = folder / name
        (folder / name).write_bytes(bytes(100))
    return made


def test_a_window_of_bytes_is_read_ahead(tmp_path: Path, advised: list[str]) -> None:
    ahead = ReadAhead(files(tmp_path), window=200)
    ahead.reached("")
    assert advised == ["a", "b"]
    ahead.reached("tensor a")
    assert advised == ["a", "b", "c"]
    ahead.reached("another model's")
    ahead.reached("tensor a")
    assert advised == ["a", "b", "c"]
    # What the worker has read already is not read for it.
    ahead.reached("tensor e")
    assert advised == ["a", "b", "c", "f"]
    ahead.reached("tensor f")
    assert advised == ["a", "b", "c", "f"]


def test_a_file_that_is_gone_hinders_no_other(tmp_path: Path, advised: list[str]) -> None:
    made = files(tmp_path)
    made["tensor a"].unlink()
    ReadAhead(made, window=150).reached("")
    assert advised == ["b", "c"]
