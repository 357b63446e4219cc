"""What an Ollama's runner really holds is read off its process."""

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
    """A process named ``ollama`` with a child that has the blob on its command line and holds 80 MiB."""
    script = tmp_path / "ollama"
    script.write_text(f'#!/bin/sh\n"{sys.executable}" -c "{HOLD}" --model {BLOB}\nexit 0\n')
    script.chmod(0o755)
    process = subprocess.Popen([str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    yield process
    process.communicate()


def test_a_runner_is_found_by_its_file(ollama: subprocess.Popen[bytes]) -> None:
    memory = RunnerMemory()
    resident = memory.resident([BLOB, "/models/blobs/sha256-other"], 0.0)
    assert list(resident) == [BLOB]
    assert 80 * MIB <= resident[BLOB] < 200 * MIB
    ollama.communicate()
    assert memory.resident([BLOB], 1.0) == {}
    assert memory.resident([BLOB], 1.0 + SCAN_SECONDS) == {}


def test_what_reads_the_same_file_for_this_daemon_is_no_runner() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, "--model", BLOB], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as ours:
        assert ours.stdout is not None and ours.stdout.readline() == b"ready\n"
        assert RunnerMemory().resident([BLOB], 0.0) == {}
        ours.communicate()


def test_what_is_freed_is_what_is_held_and_no_more() -> None:
    me = replace(record("a"), devices=(cpu_device(8 * GIB),))
    loaded = Loaded(name="m", size=4 * GIB, size_vram=0)
    (known,) = placement(me, loaded, None, 1500 * MIB)
    assert known.bytes == 4 * GIB
    assert known.freed == -(-1500 * MIB // RESIDENT_STEP) * RESIDENT_STEP
    (unknown,) = placement(me, loaded, None)
    assert unknown.freed == 4 * GIB
    assert Placed("a", "CPU", 0, 1, GIB, resident=2 * GIB).freed == GIB


def test_an_ollama_makes_no_more_room_than_its_runners_hold() -> None:
    device = replace(cpu_device(8 * GIB), free=2 * GIB)
    placed = Placed("a", "CPU", 0, 1, 4 * GIB, resident=GIB)
    idle = Endpoint("ollama:m", "m", "", Backend.OLLAMA, State.READY, bytes=4 * GIB, placed=(placed,))
    assert ollama_room(replace(record("a"), devices=(device,), endpoints=(idle,))) == 3 * GIB
