"""Measurement of the memory bandwidth."""

from __future__ import annotations

import mmap
import threading
from pathlib import Path
from typing import Any

import pytest

from sollold.machine import speed as speed_module
from sollold.machine.memory import Memory
from sollold.machine.speed import bandwidth, speed
from sollold.settings.schema import MIB


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the buffers that are mapped."""
    sizes: list[int] = []
    real = mmap.mmap

    def record_mmap(file: int, size: int) -> mmap.mmap:
        sizes.append(size)
        return real(file, size)

    monkeypatch.setattr(mmap, "mmap", record_mmap)
    monkeypatch.setattr(speed_module, "_MEASURE_SECONDS", 0.01)
    return sizes


def test_buffers_use_at_most_a_quarter_of_the_free_memory(mapped: list[int]) -> None:
    assert bandwidth(2, 64 * MIB) > 0
    assert len(mapped) == 4 and sum(mapped) <= 16 * MIB


def test_buffers_respect_the_limit_of_a_control_group(
    mapped: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed_module, "cores", lambda: 2)
    monkeypatch.setattr(speed_module, "memory", lambda: Memory(256 * MIB, 64 * MIB))
    assert speed(tmp_path / "speed.json").bandwidth > 0
    assert sum(mapped) <= 16 * MIB


def test_without_memory_nothing_is_measured_or_saved(
    mapped: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed_module, "memory", lambda: Memory(256 * MIB, MIB))
    assert speed(tmp_path / "speed.json").bandwidth == 0.0
    assert mapped == [] and not (tmp_path / "speed.json").exists()


def test_a_failed_buffer_allocation_does_not_block_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    real = mmap.mmap
    taken: list[int] = []

    def record_mmap(file: int, size: int) -> mmap.mmap:
        taken.append(size)
        if len(taken) > 2:
            raise OSError(12, "Cannot allocate memory")
        return real(file, size)

    monkeypatch.setattr(mmap, "mmap", record_mmap)
    assert bandwidth(3, 64 * MIB) == 0.0


def test_a_failed_thread_start_does_not_block_other_threads(
    mapped: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = threading.Thread.start
    started: list[threading.Thread] = []

    def start(thread: threading.Thread, *more: Any) -> None:
        started.append(thread)
        if len(started) > 1:
            raise RuntimeError("can't start new thread")
        real(thread, *more)

    monkeypatch.setattr(threading.Thread, "start", start)
    assert bandwidth(2, 64 * MIB) == 0.0
