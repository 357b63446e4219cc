"""Reading tensor files ahead of a worker, within a window."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sollold.agent.read_ahead import ReadAhead


@pytest.fixture
def advised(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files passed to posix_fadvise, in order."""
    names: list[str] = []

    def fadvise(handle: int, start: int, length: int, advice: int) -> None:
        assert (start, length, advice) == (0, 0, os.POSIX_FADV_WILLNEED)
        names.append(Path(f"/proc/self/fd/{handle}").readlink().name)

    monkeypatch.setattr(os, "posix_fadvise", fadvise)
    return names


def files(folder: Path) -> dict[str, Path]:
    paths = {}
    for name in "abcdef":
        paths[f"tensor {name}"] = folder / name
        (folder / name).write_bytes(bytes(100))
    return paths


def test_a_window_of_bytes_is_read_ahead(tmp_path: Path, advised: list[str]) -> None:
    ahead = ReadAhead(files(tmp_path), window=200)
    ahead.reached("")
    assert advised == ["a", "b"]
    ahead.reached("tensor a")
    assert advised == ["a", "b", "c"]
    ahead.reached("another model's")
    ahead.reached("tensor a")
    assert advised == ["a", "b", "c"]
    # Files that the worker has already read are skipped.
    ahead.reached("tensor e")
    assert advised == ["a", "b", "c", "f"]
    ahead.reached("tensor f")
    assert advised == ["a", "b", "c", "f"]


def test_a_missing_file_is_skipped(tmp_path: Path, advised: list[str]) -> None:
    paths = files(tmp_path)
    paths["tensor a"].unlink()
    ReadAhead(paths, window=150).reached("")
    assert advised == ["b", "c"]
