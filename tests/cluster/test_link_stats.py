"""Link measurements, and when they are published."""

from __future__ import annotations

from math import inf, nan

import pytest

from sollold.cluster.net.link_stats import LinkStats

B, C = "b" * 16, "c" * 16


def test_a_new_link_and_its_first_rate_are_published_at_once() -> None:
    stats = LinkStats()
    assert stats.note(B, 0.001, 0.0, 100.0)
    assert stats.note(C, 0.002, 0.0, 100.1)
    assert stats.note(B, 0.001, 1e8, 100.2)
    assert stats.told() == ((B, 0.001, 1e8), (C, 0.002, 0.0))


def test_noise_is_never_published() -> None:
    stats = LinkStats()
    stats.note(B, 0.002, 1e8, 0.0)
    assert not any(stats.note(B, 0.002 + late, 1e8, float(late * 1e6)) for late in (1e-4, 4e-4, -4e-4))
    assert stats.told() == ((B, 0.002, 1e8),)


def test_changes_of_many_links_are_published_together() -> None:
    stats = LinkStats()
    nodes = [f"{number:016x}" for number in range(19)]
    for node in nodes:
        stats.note(node, 0.001, 1e8, 0.0)
    # Each link is measured every 15 s, and round trips differ on busy machines.
    published = 0
    for step in range(400):
        published += stats.note(nodes[step % 19], 0.001 * (1 + step % 7), 1e8, 1.0 + step * 15 / 19)
    assert 15 <= published <= 22  # in 316 s; unbatched changes would be about 340
    assert stats.note(nodes[0], 0.5, 1e8, 400.0)
    assert stats.told()[0] == (nodes[0], 0.5, 1e8)


def test_a_pending_change_is_published_with_the_next_measurement_of_any_link() -> None:
    stats = LinkStats()
    stats.note(B, 0.001, 1e8, 0.0)
    stats.note(C, 0.001, 1e8, 0.0)
    assert not stats.note(B, 0.1, 1e8, 5.0)
    assert stats.note(C, 0.001, 1e8, 15.0)
    assert stats.told()[0] == (B, 0.1, 1e8)
    assert not stats.note(B, 0.1, 1e8, 31.0)


@pytest.mark.parametrize(
    ("trip", "rate"), [(inf, 0.0), (1e300, 0.0), (nan, 0.0), (0.001, nan), (0.001, inf), (0.001, -1.0)]
)
def test_impossible_measurements_of_a_peer_are_not_published(trip: float, rate: float) -> None:
    stats = LinkStats()
    assert not stats.note(B, trip, rate, 0.0) and stats.told() == ()
    assert stats.note(B, 0.001, 1e8, 1.0)
    assert not stats.note(B, trip, rate, 100.0)
    assert stats.told() == ((B, 0.001, 1e8),)
