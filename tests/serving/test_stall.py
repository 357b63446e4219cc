"""Detection of hung engines, with a simulated clock."""

from __future__ import annotations

import pytest

from sollold.serving.watchdog import RequestProgress


def test_silence_past_the_limit_is_a_hang_unless_there_is_work() -> None:
    progress = RequestProgress(0.0, 10.0, 0.0)
    # Prompt processing may take longer.
    assert not progress.hung(20.0) and progress.hung(31.0)
    progress.received(31.0)
    progress.wanted(31.0)
    assert not progress.hung(41.0) and progress.hung(42.0)
    progress.worked(1, 42.0)
    progress.worked(2, 42.0)
    assert not progress.hung(43.0) and progress.doubtful(45.0)


@pytest.mark.parametrize("least", [0.0, -1.0])
@pytest.mark.parametrize("speed", [0.0, 50.0])
def test_without_a_limit_no_engine_is_hung(least: float, speed: float) -> None:
    progress = RequestProgress(0.0, least, speed)
    assert not progress.hung(1e9) and not progress.doubtful(1e9)
    progress.received(1.0)
    progress.wanted(1.0)
    assert not progress.hung(1e9)
