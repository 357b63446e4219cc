"""Parsing and formatting of sizes and durations."""

from __future__ import annotations

import time

import pytest

from sollold.units import bytes_text, file_time_text, parse_bytes, parse_seconds, seconds_text


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("12", 12),
        ("400 MB", 400_000_000),
        ("400MiB", 400 << 20),
        ("1.5g", 3 << 29),
        (" 2 T ", 2 << 40),
    ],
)
def test_sizes_are_parsed(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "x", "-1", "1 pound", "1e3", "nan"])
def test_invalid_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["9" * 400, "9999999 TiB"])
def test_huge_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is too large"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("-1", -1),
        ("5m", 300),
        ("1h30m", 5400),
        ("1.5h", 5400),
        ("250ms", 0.25),
        ("-1m", -60),
        ("0", 0),
    ],
)
def test_durations_are_parsed(text: str, seconds: float) -> None:
    assert parse_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "m", "5 parsecs", "inf", "nan", "5m3", "9" * 400 + "s"])
def test_invalid_durations_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        parse_seconds(text)


def test_sizes_and_durations_are_formatted() -> None:
    assert [bytes_text(n) for n in (0, 1023, 1536, 400 << 20, 9_000 << 20, 20 << 30, -1536)] == [
        "0 B",
        "1023 B",
        "1.50 KiB",
        "400 MiB",
        "8.79 GiB",
        "20.0 GiB",
        "-1.50 KiB",
    ]
    assert [seconds_text(s) for s in (0.25, 9.5, 30, 95, 3600, 200_000)] == [
        "250 ms",
        "9.5 s",
        "30 s",
        "1 min 35 s",
        "1 h",
        "2 d 7 h",
    ]


def test_very_long_texts_are_refused_quickly() -> None:
    for text in ("9" * 5_000_000, "1h" * 2_000_000, "x" * 5_000_000):
        before = time.thread_time()
        for parse in (parse_seconds, parse_bytes):
            with pytest.raises(ValueError, match="too long for a number"):
                parse(text)
        assert time.thread_time() - before < 0.05


@pytest.mark.parametrize("seconds", [0.0, 1.0, -62135596800.0])
def test_a_missing_file_time_is_ollamas_zero_time(seconds: float) -> None:
    assert file_time_text(seconds) == "0001-01-01T00:00:00Z"
    assert file_time_text(1.75e9) == "2025-06-15T15:06:40Z"
