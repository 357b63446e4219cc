"""The violations that a chaos run reports for invented outcomes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.chaos.callers import DIALECTS, Stream
from tests.chaos.faults import Done
from tests.chaos.report import ENOUGH, forbidden
from tests.chaos.round import FaultResult, Outcome


def fault_result(wait: float) -> FaultResult:
    return FaultResult(Done("kill -9 of a worker", "node0", frozenset(), 0.0), [], [wait])


def test_a_median_above_the_limit_is_a_violation_with_enough_faults() -> None:
    outcome = Outcome(load=1.0, read=1.0, results=[fault_result(9.0) for _ in range(ENOUGH - 1)])
    assert not forbidden(outcome)
    outcome.results.append(fault_result(9.0))
    assert "above 4.0 s" in forbidden(outcome)[0]
    outcome.results = [fault_result(3.0) for _ in range(ENOUGH)]
    assert not forbidden(outcome)


@pytest.mark.parametrize(
    ("error", "allowed"),
    [
        ({"status": 503, "error": "503 stopping"}, True),
        ({"status": 404, "error": "404 not found"}, False),
        ({"status": 500, "error": "500 oops"}, False),
        ({"error": "the answer was interrupted"}, True),
        ({"error": "the node failed for a reason it did not expect"}, False),
        ({"error": "ConnectionResetError", "broken": True}, True),
    ],
)
def test_a_hurt_node_may_only_return_clear_errors(error: dict[str, Any], allowed: bool) -> None:
    node: Any = SimpleNamespace(name="node0")
    stream = Stream(DIALECTS[0], node, 10, began=5.0, ended=6.0, **error)
    outcome = Outcome(load=1.0, read=1.0, streams=[stream], hurt={"node0": [(4.0, 7.0)]})
    assert bool(forbidden(outcome)) is not allowed
    outcome.hurt = {}
    assert forbidden(outcome)
