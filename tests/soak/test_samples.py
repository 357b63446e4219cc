"""Detection of growth in synthetic samples."""

from __future__ import annotations

from dataclasses import replace

from tests.soak.samples import Sample, grown, median_sample, sparkline

FIRST = Sample(memory=100.0, descriptors=40, threads=8, tasks=30, files=20, deployments=10, logs=1.0)


def test_growth_is_allowed_up_to_five_percent_or_the_slack() -> None:
    assert not grown("node0", FIRST, replace(FIRST, memory=105.0, descriptors=42, threads=10, logs=9.0))
    assert grown("node0", FIRST, replace(FIRST, memory=106.0)) == ["node0: memory went from 100.0 to 106.0"]
    worse = replace(FIRST, descriptors=43, threads=11, tasks=33, files=23, deployments=22)
    assert len(grown("node0", FIRST, worse)) == 5
    assert grown("node0", FIRST, replace(FIRST, logs=500.0))
    assert not grown("node0", FIRST, replace(FIRST, memory=60.0, tasks=1))


def test_an_outlier_does_not_change_the_median_sample() -> None:
    assert median_sample([FIRST, replace(FIRST, tasks=90), FIRST]) == FIRST


def test_a_sparkline_spans_from_minimum_to_maximum() -> None:
    assert sparkline([1.0, 2.0, 3.0]).startswith("▁▄█  1.0 to 3.0")
    assert sparkline([5.0] * 500).startswith("▁" * 56)
    assert sparkline([]) == ""
