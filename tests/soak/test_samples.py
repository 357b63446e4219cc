"""What a soak calls grown, from made-up samples."""

from __future__ import annotations

from dataclasses import replace

from tests.soak.samples import Sample, drawn, grown, middle

FIRST = Sample(memory=100.0, descriptors=40, threads=8, tasks=30, files=20, deployments=10, logs=1.0)


def test_five_per_cent_and_a_few_may_come_and_more_may_not() -> None:
    assert not grown("node0", FIRST, replace(FIRST, memory=105.0, descriptors=42, threads=10, logs=9.0))
    assert grown("node0", FIRST, replace(FIRST, memory=106.0)) == ["node0: memory went from 100.0 to 106.0"]
    worse = replace(FIRST, descriptors=43, threads=11, tasks=33, files=23, deployments=22)
    assert len(grown("node0", FIRST, worse)) == 5
    assert grown("node0", FIRST, replace(FIRST, logs=500.0))
    assert not grown("node0", FIRST, replace(FIRST, memory=60.0, tasks=1))


def test_one_look_that_is_off_changes_nothing() -> None:
    assert middle([FIRST, replace(FIRST, tasks=90), FIRST]) == FIRST


def test_a_line_is_drawn_from_the_least_to_the_most() -> None:
    assert drawn([1.0, 2.0, 3.0]).startswith("▁▄█  1.0 to 3.0")
    assert drawn([5.0] * 500).startswith("▁" * 56)
    assert drawn([]) == ""
