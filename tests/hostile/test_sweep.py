"""A short sweep of hostile requests and connections; `make hostile` runs the long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from sollold.engines.install.find import Llama
from tests.hostile.sweep import sweep

pytestmark = [pytest.mark.cluster, pytest.mark.llama, pytest.mark.timeout(300)]


def test_hostile_requests_and_connections_affect_no_daemon_or_stream(tmp_path: Path, llama: Llama) -> None:
    # A slow or busy machine needs longer for each step of the loop.
    outcome = sweep(llama, tmp_path, requests=240, connected=50, seed=1, held=3, longest_stop=0.3)
    print("\n".join(outcome.report()))
    assert not outcome.wrong
    assert len(outcome.streams) > 3
    assert sum(tally.statuses.total() for tally in outcome.tallies.values()) == 240
