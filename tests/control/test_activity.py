"""Counters of finished requests by route and model, with bounded size, and the engine's token counts."""

from __future__ import annotations

from typing import Any

import pytest

from sollold.control.activity import (
    MOST_LABELS,
    MOST_RECENT,
    Activity,
    FinishedRequest,
    Histogram,
    generation_seconds,
    token_counts,
)


def done(**changes: Any) -> FinishedRequest:
    facts: dict[str, Any] = {
        "id": "1",
        "time": 1.0,
        "path": "/api/chat",
        "model": "demo:latest",
        "node": "anna",
        "backend": "llama.cpp-local",
        "outcome": "ok",
        "error": "",
        "prompt_tokens": 7,
        "tokens": 3,
        "first_token": 0.2,
        "seconds": 1.0,
        "queue": 0.0,
        "load": 0.0,
        "resumed": 0,
    }
    return FinishedRequest(**{**facts, **changes})


@pytest.mark.parametrize(
    ("raw", "account"),
    [
        (
            b'{"timings":{"cache_n":4,"prompt_n":3,"prompt_ms":1.0,"predicted_n":20,"predicted_ms":5}}',
            (7, 20),
        ),
        (b'{"usage":{"prompt_tokens":9,"completion_tokens":12,"total_tokens":21}}', (9, 12)),
        (b'{"done":true,"prompt_eval_count":5,"eval_count":6}', (5, 6)),
        (b'{"choices":[{"delta":{"content":"x"}}]}', None),
        (b'{"content":"he said \\"eval_count\\": 99"}', None),
        (b"", None),
    ],
)
def test_token_counts_at_the_end_of_an_answer(raw: bytes, account: tuple[int, int] | None) -> None:
    assert token_counts(raw) == account


def test_generation_time_at_the_end_of_an_answer() -> None:
    assert generation_seconds(b'{"timings":{"prompt_ms":1.0,"predicted_n":20,"predicted_ms":5.5}}') == 0.0055
    assert generation_seconds(b'{"done":true,"eval_count":6,"eval_duration":2500000000}') == 2.5
    assert generation_seconds(b'{"usage":{"prompt_tokens":9},"data":[]}') is None


def test_counts_by_route_and_model() -> None:
    activity = Activity()
    resumed_requests: list[FinishedRequest] = []
    activity.on_resumed = resumed_requests.append
    activity.add_finished(done(), [1, 1], 0.1)
    activity.add_finished(
        done(outcome="error", node="", known=False, first_token=-1.0, tokens=0, prompt_tokens=0)
    )
    activity.add_finished(done(resumed=2), lost=3.0)
    stats = activity.stats["/api/chat", "demo:latest"]
    assert (stats.prompt_tokens, stats.generated_tokens, stats.outcomes) == (14, 6, {"ok": 2})
    # Unresolved model names come from callers and get no series of their own.
    assert activity.stats["/api/chat", ""].outcomes == {"error": 1}
    assert (
        activity.failed == 1
        and activity.resumed == 2
        and [request.resumed for request in resumed_requests] == [2]
    )
    assert activity.gap.sum == 3.0


def test_the_number_of_series_is_bounded() -> None:
    activity = Activity()
    for number in range(MOST_LABELS + 50):
        activity.add_finished(done(model=f"m{number}"))
    assert len(activity.recent) == MOST_RECENT
    assert len(activity.stats) == MOST_LABELS + 1
    assert activity.stats["/api/chat", "other"].outcomes == {"ok": 50}


def test_histogram_buckets() -> None:
    histogram = Histogram((1, 2.5))
    for value in (0.5, 1.0, 2.0, 9.0):
        histogram.observe(value)
    assert histogram.cumulative() == [("1", 2), ("2.5", 3), ("+Inf", 4)] and histogram.sum == 12.5
    histogram.add([0, 1, 1], 12.0)
    assert histogram.cumulative() == [("1", 2), ("2.5", 4), ("+Inf", 6)]
