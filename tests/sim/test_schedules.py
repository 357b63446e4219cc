"""Thousands of random histories; a broken one is replayed with ``python -m tests.sim --seed N``."""

from __future__ import annotations

import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from .schedule import Outcome, run

COUNT = int(os.environ.get("SOLLOLD_SCHEDULES", "3000"))
SECONDS = 170.0
FLOOR = int(os.environ.get("SOLLOLD_SCHEDULES_FLOOR", "2000"))
"""So many must have been played by then; a machine that is known to be slow sets it lower."""
_CHUNK = 25


def _runs(first: int, until: float) -> list[Outcome]:
    return [run(seed) for seed in range(first, first + _CHUNK) if time.time() < until]


@pytest.mark.timeout(900)
def test_random_schedules() -> None:
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        firsts = range(0, COUNT, _CHUNK)
        chunks = pool.map(_runs, firsts, [time.time() + SECONDS] * len(firsts))
        outcomes = [one for chunk in chunks for one in chunk]
    broken = [f"python -m tests.sim --seed {one.seed}: {one.fault}" for one in outcomes if one.fault]
    assert not broken, "\n".join(broken)
    print(f"{len(outcomes)} schedules")
    assert len(outcomes) >= min(COUNT, FLOOR), (
        f"only {len(outcomes)} schedules in {SECONDS:.0f} s: this machine is too busy, or the simulator has "
        "become slow (SOLLOLD_SCHEDULES_FLOOR lowers what is asked)"
    )


def test_a_seed_is_a_history() -> None:
    first: list[str] = []
    second: list[str] = []
    assert run(3, first.append) == run(3, second.append)
    assert first == second
    assert len(first) > 20
