"""A short round of faults; `make chaos` runs the long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from sollold.agent.llama_find import Llama
from tests.chaos.report import forbidden, report
from tests.chaos.round import run

pytestmark = [pytest.mark.cluster, pytest.mark.llama, pytest.mark.timeout(900)]


def test_every_answer_is_exact_whatever_dies(tmp_path: Path, llama: Llama) -> None:
    outcome = run(llama, tmp_path, faults=8, seed=1, short=True, seconds=150)
    print("\n".join(report(outcome)))
    assert outcome.struck
    assert not forbidden(outcome)
