"""Thousands of random histories; a broken one is replayed with ``python -m tests.sim --seed N``."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from .schedule import Outcome, run

COUNT = int(os.environ.get("SOLLOLD_TEST_SCHEDULES", "500"))
_CHUNK = 25


def _runs(first: int) -> list[Outcome]:
    return [run(seed) for seed in range(first, first + _CHUNK)]


@pytest.mark.timeout(1800)
def test_random_schedules() -> None:
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        outcomes = [one for chunk in pool.map(_runs, range(0, COUNT, _CHUNK)) for one in chunk]
    broken = [f"python -m tests.sim --seed {one.seed}: {one.fault}" for one in outcomes if one.fault]
    assert not broken, "\n".join(broken)
    assert len(outcomes) == COUNT


def test_a_seed_is_a_history() -> None:
    first: list[str] = []
    second: list[str] = []
    assert run(4, first.append) == run(4, second.append)
    assert first == second
    assert len(first) > 20
