"""Random schedules of faults; replay a failing one with ``python -m tests.sim --seed N``."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from .schedule import Outcome, run

COUNT = int(os.environ.get("SOLLOLD_TEST_SCHEDULES", "500"))
_CHUNK = 25


def _run_chunk(first: int) -> list[Outcome]:
    return [run(seed) for seed in range(first, first + _CHUNK)]


@pytest.mark.timeout(1800)
def test_invariants_hold_in_random_schedules() -> None:
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        outcomes = [outcome for chunk in pool.map(_run_chunk, range(0, COUNT, _CHUNK)) for outcome in chunk]
    failures = [
        f"python -m tests.sim --seed {outcome.seed}: {outcome.fault}" for outcome in outcomes if outcome.fault
    ]
    assert not failures, "\n".join(failures)
    assert len(outcomes) == COUNT


def test_a_seed_determines_the_schedule() -> None:
    first: list[str] = []
    second: list[str] = []
    assert run(4, first.append) == run(4, second.append)
    assert first == second
    assert len(first) > 20
