from __future__ import annotations

import mmap
import threading
from pathlib import Path
from typing import Any

import pytest

from sollold.machine import speed as measured
from sollold.machine.memory import Memory
from sollold.machine.speed import bandwidth, speed
from sollold.settings.schema import MIB


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the buffers that are taken."""
    sizes: list[int] = []
    real = mmap.mmap

    def take(file: int, size: int) -> mmap.mmap:
        sizes.append(size)
        return real(file, size)

    monkeypatch.setattr(measured.mmap, "mmap", take)
    monkeypatch.setattr(measured, "_MEASURE_SECONDS", 0.01)
    return sizes


def test_buffers_take_a_quarter_of_what_is_free_at_the_most(mapped: list[int]):
    assert bandwidth(2, 64 * MIB) > 0
    assert len(mapped) == 4 and sum(mapped) <= 16 * MIB


def test_what_a_control_group_leaves_is_all_that_is_used(
    mapped: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(measured, "cores", lambda: 2)
    monkeypatch.setattr(measured, "memory", lambda: Memory(256 * MIB, 64 * MIB))
    assert speed(tmp_path / "speed.json").bandwidth > 0
    assert sum(mapped) <= 16 * MIB


def test_without_memory_nothing_is_measured_or_kept(
    mapped: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(measured, "memory", lambda: Memory(256 * MIB, MIB))
    assert speed(tmp_path / "speed.json").bandwidth == 0.0
    assert mapped == [] and not (tmp_path / "speed.json").exists()


def test_a_thread_without_a_buffer_holds_none_up(monkeypatch: pytest.MonkeyPatch):
    real = mmap.mmap
    taken: list[int] = []

    def take(file: int, size: int) -> mmap.mmap:
        taken.append(size)
        if len(taken) > 2:
            raise OSError(12, "Cannot allocate memory")
        return real(file, size)

    monkeypatch.setattr(measured.mmap, "mmap", take)
    assert bandwidth(3, 64 * MIB) == 0.0


def test_a_thread_that_can_not_be_started_holds_none_up(mapped: list[int], monkeypatch: pytest.MonkeyPatch):
    real = threading.Thread.start
    started: list[threading.Thread] = []

    def start(thread: threading.Thread, *more: Any) -> None:
        started.append(thread)
        if len(started) > 1:
            raise RuntimeError("can't start new thread")
        real(thread, *more)

    monkeypatch.setattr(threading.Thread, "start", start)
    assert bandwidth(2, 64 * MIB) == 0.0
