"""When what is done every so often is done."""

from __future__ import annotations

import pytest

from sollold.turns import pause


@pytest.mark.parametrize(
    ("now", "seconds", "then"),
    [
        (10.0, 1.0, 11.0),
        (10.4, 1.0, 11.0),
        (10.6, 1.0, 12.0),
        (10.9995, 1.0, 12.0),
        (7.1, 3.0, 9.0),
        (0.0, 0.5, 0.5),
    ],
)
def test_turns_are_multiples_and_none_is_had_twice(now: float, seconds: float, then: float) -> None:
    assert now + pause(now, seconds) == pytest.approx(then)
