"""History: one hour by seconds and one day by minutes in arrays of constant size."""

from __future__ import annotations

import math

from sollold.control.history import (
    DAY,
    HOUR,
    MOST_POINTS,
    MOST_SERIES,
    History,
    HistoryRequest,
    NodeHistory,
    bounded_request,
    totals,
)

TOKENS = ("", "tokens_per_second")


def read(history: History, seconds: int, step: int) -> list[float]:
    return history.read("aa", "anna", HistoryRequest(seconds, step)).series["tokens_per_second"]


def test_the_newest_point_is_last_and_missing_points_are_nan() -> None:
    history = History()
    for value in range(5):
        history.add({TOKENS: float(value)})
    points = read(history, 8, 1)
    assert all(math.isnan(value) for value in points[:3]) and points[3:] == [0, 1, 2, 3, 4]


def test_steps_average_whole_buckets() -> None:
    history = History()
    for value in range(25):
        history.add({TOKENS: float(value)})
    # Buckets end at multiples of ten: seconds 20 to 24 are in no bucket yet.
    assert read(history, 20, 10) == [4.5, 14.5]


def test_the_hour_is_a_ring_buffer() -> None:
    history = History()
    for value in range(HOUR + 100):
        history.add({TOKENS: float(value % 1000)})
    points = read(history, HOUR, 1)
    assert len(points) == HOUR
    assert points == [float(value % 1000) for value in range(100, HOUR + 100)]


def test_a_day_is_kept_by_minutes() -> None:
    history = History()
    for second in range(3 * HOUR):
        history.add({TOKENS: float(second // 60)})
    points = read(history, 7200, 60)
    assert points == [float(minute) for minute in range(60, 180)]
    assert read(history, 7200, 600)[-1] == 174.5


def test_a_device_added_later_begins_with_nan_and_its_removal_is_visible() -> None:
    history = History()
    history.add({TOKENS: 1.0})
    history.add({TOKENS: 1.0, ("CUDA0", "used_bytes"): 5.0})
    history.add({TOKENS: 1.0})
    used = history.read("aa", "anna", HistoryRequest(3, 1)).devices["CUDA0"]["used_bytes"]
    assert math.isnan(used[0]) and used[1] == 5.0 and math.isnan(used[2])


def test_its_size_is_bounded() -> None:
    history = History()
    for device in range(MOST_SERIES * 2):
        history.add({(f"d{device}", "used_bytes"): 1.0})
    assert len(history._rings) * (HOUR + DAY) * 4 < 5_000_000


def test_requests_are_clamped() -> None:
    assert bounded_request(600, 0) == HistoryRequest(600, 2)
    assert bounded_request(1, 1) == HistoryRequest(10, 1)
    assert bounded_request(86_400, 0) == HistoryRequest(86_400, 240)
    assert bounded_request(999_999_999, 7).step % 60 == 0
    for seconds in (10, 599, 3600, 3601, 50_000, 86_400, 999_999):
        for step in (0, 1, 59, 61, 100_000):
            found = bounded_request(seconds, step)
            assert found.seconds % found.step == 0 and 0 < found.seconds // found.step <= MOST_POINTS


def test_totals_sum_the_known_values() -> None:
    nan = math.nan
    a = NodeHistory("a", "a", {"tokens_per_second": [1.0, nan], "first_token_seconds": [2.0, nan]})
    b = NodeHistory("b", "b", {"tokens_per_second": [2.0, 5.0], "first_token_seconds": [4.0, nan]})
    total = totals([a, b], 2)
    assert total["tokens_per_second"] == [3.0, 5.0]
    assert total["first_token_seconds"][0] == 3.0 and math.isnan(total["first_token_seconds"][1])
    assert math.isnan(total["active"][0])
