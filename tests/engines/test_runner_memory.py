"""Resident memory of Ollama's runners, read from their processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sollold.cluster.gossip.record import Backend, Endpoint, Placed, State
from sollold.engines.ollama.api import Loaded
from sollold.engines.ollama.loaded import RESIDENT_STEP, placement
from sollold.engines.ollama.runner_memory import SCAN_SECONDS, RunnerMemory
from sollold.placement.inventory import ollama_room
from tests.doubles import record
from tests.leader.cluster import cpu_device
from tests.placement.fleets import GIB, MIB

BLOB = "/usr/share/ollama/.ollama/models/blobs/sha256-0123456789abcdef"
HOLD = "import sys; held = b'x' * (80 << 20); print('ready', flush=True); sys.stdin.read()"


@pytest.fixture
def ollama(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process named ``ollama`` with a child that has the blob in its arguments and 80 MiB of memory."""
    script = tmp_path / "ollama"
    script.write_text(f'#!/bin/sh\n"{sys.executable}" -c "{HOLD}" --model {BLOB}\nexit 0\n')
    script.chmod(0o755)
    process = subprocess.Popen([str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    yield process
    process.communicate()


def test_a_runner_is_found_by_its_blob(ollama: subprocess.Popen[bytes]) -> None:
    memory = RunnerMemory()
    resident = memory.resident([BLOB, "/models/blobs/sha256-other"], 0.0)
    assert list(resident) == [BLOB]
    assert 80 * MIB <= resident[BLOB] < 200 * MIB
    ollama.communicate()
    assert memory.resident([BLOB], 1.0) == {}
    assert memory.resident([BLOB], 1.0 + SCAN_SECONDS) == {}


def test_a_child_of_this_daemon_is_not_a_runner() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, "--model", BLOB], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        assert RunnerMemory().resident([BLOB], 0.0) == {}
        child.communicate()


def test_freed_memory_is_limited_to_resident_memory() -> None:
    me = replace(record("a"), devices=(cpu_device(8 * GIB),))
    loaded = Loaded(name="m", size=4 * GIB, size_vram=0)
    (known,) = placement(me, loaded, None, 1500 * MIB)
    assert known.bytes == 4 * GIB
    assert known.freed == -(-1500 * MIB // RESIDENT_STEP) * RESIDENT_STEP
    (unknown,) = placement(me, loaded, None)
    assert unknown.freed == 4 * GIB
    assert Placed("a", "CPU", 0, 1, GIB, resident=2 * GIB).freed == GIB


def test_the_room_of_an_ollama_counts_only_resident_memory() -> None:
    device = replace(cpu_device(8 * GIB), free=2 * GIB)
    placed = Placed("a", "CPU", 0, 1, 4 * GIB, resident=GIB)
    idle = Endpoint("ollama:m", "m", "", Backend.OLLAMA, State.READY, bytes=4 * GIB, placed=(placed,))
    assert ollama_room(replace(record("a"), devices=(device,), endpoints=(idle,))) == 3 * GIB
