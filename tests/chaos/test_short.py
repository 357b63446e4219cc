"""A short chaos run; `make chaos` runs a long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from sollold.engines.install.find import Llama
from tests.chaos.report import forbidden, report
from tests.chaos.round import run

pytestmark = [pytest.mark.cluster, pytest.mark.llama, pytest.mark.patient, pytest.mark.timeout(900)]


def test_every_response_is_exact_despite_faults(tmp_path: Path, llama: Llama) -> None:
    outcome = run(llama, tmp_path, faults=7, seed=1, short=True, seconds=240)
    print("\n".join(report(outcome)))
    assert len(outcome.results) >= 5
    assert not forbidden(outcome)


def test_a_model_that_needs_every_node_survives_the_absence_of_each(tmp_path: Path, llama: Llama) -> None:
    outcome = run(llama, tmp_path, faults=3, seed=1, short=True, needs_all=True, seconds=180)
    print("\n".join(report(outcome)))
    assert len(outcome.results) >= 2
    assert not forbidden(outcome)
