"""Push-pull: what two nodes exchange when one knows more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from sollold.cluster.gossip import push_pull as exchange_module
from sollold.cluster.gossip.actions import Action, Change, PersistedState, PushPullWith
from sollold.cluster.gossip.gossip import Gossip
from sollold.cluster.gossip.packet import Ack, Ping
from tests.cluster.gossip_core import (
    BOOT,
    ME,
    B,
    C,
    D,
    at,
    bury,
    changes,
    core,
    exchange,
    know,
    of,
    play,
    says,
    sent,
)


def test_a_push_pull_makes_both_know_all() -> None:
    one, other = know(core(ME), C), know(core(B, boot=3), D)
    one.update_record(replace(one.known.me, models="mine"), 1.0)
    other.update_record(replace(other.known.me, models="theirs"), 1.0)
    exchange(one, other, 2.0)
    assert one.known.record(B) == other.known.me
    assert other.known.record(ME) == one.known.me
    for gossip in (one, other):
        assert all(gossip.known.alive(node) for node in (ME, B, C, D))


@pytest.mark.parametrize("opens", [True, False])
def test_what_does_not_fit_one_body_comes_with_a_later_exchange(
    monkeypatch: pytest.MonkeyPatch, opens: bool
) -> None:
    monkeypatch.setattr(exchange_module, "_ROOM", 9000)
    one, other = core(ME), core(B, boot=3)
    nodes = [f"{number:016x}" for number in range(100, 109)]
    for node in nodes:
        writer = core(node, boot=4)
        writer.update_record(replace(writer.known.me, models="m" * 2000), 1.0)
        exchange(one, writer, 1.0)
    sides = (one, other) if opens else (other, one)
    rounds = 0
    while not all(other.known.record(node) == one.known.record(node) for node in nodes):
        rounds += 1
        body, turn, largest = sides[0].push_pull_open(), 1, 0
        while body:
            largest = max(largest, len(body))
            body, _ = sides[turn].push_pull(body, None, 2.0)
            turn = 1 - turn
        assert largest < 12_000
    assert rounds == 3


def test_equals_exchange_little() -> None:
    one, other = core(ME), core(B, boot=3)
    one.update_record(replace(one.known.me, models="m" * 5000), 1.0)
    exchange(one, other, 2.0)
    answer, _ = other.push_pull(one.push_pull_open(), at(ME), 3.0)
    assert len(answer) < 500


def test_the_dead_of_a_push_pull_are_suspects() -> None:
    one, other = know(core(ME), C), know(core(B, boot=3), C)
    bury(other, C)
    actions = exchange(one, other, 2.0)
    assert (Change.SUSPECTED, C) in changes(actions)
    assert one.known.alive(C)


def test_a_restart_without_disk_ends_above_the_old_record() -> None:
    before, peer = core(ME, kept=PersistedState(version=900)), core(B, boot=3)
    exchange(before, peer, 1.0)
    after = core(ME, boot=BOOT + 1)
    after.update_record(replace(after.known.me, models="new"), 2.0)
    exchange(after, peer, 3.0)
    exchange(after, peer, 4.0)
    held = peer.known.record(ME)
    assert held is not None
    assert held.models == "new"
    assert held.version > before.known.me.version


def test_a_record_that_came_over_tcp_goes_on_as_news() -> None:
    one, other = know(core(ME), C), core(B, boot=3)
    exchange(one, other, 2.0)
    deltas = [m for m in sent(play(one, 2.0, 3.0)) if type(m).__name__ == "Delta" and m.node == B]
    assert deltas


def test_a_peer_that_knows_something_else_is_asked() -> None:
    gossip = know(core(), B)
    asked: list[Action] = []
    now = 0.5
    for _ in range(4):
        pings: list[Ping] = []
        while not pings:
            now = max(now, gossip.next_wake())
            pings = [message for message in sent(gossip.tick(now)) if isinstance(message, Ping)]
        asked += says(gossip, B, Ack(pings[0].sequence, 12345), now=now)
    assert PushPullWith(B, (at(B),)) in asked


def test_a_failed_push_pull_is_tried_with_another() -> None:
    gossip = know(core(), B, C)
    play(gossip, 1.0, 2.0)
    actions = gossip.push_pull_done(B, False, 2.0) + play(gossip, 2.0, 3.0)
    assert PushPullWith(C, (at(C),)) in actions


def exchanges(gossip: Gossip, digest: Callable[[], int], *, until: float) -> list[float]:
    """When ``gossip`` asks for an exchange with B, which answers each ping with that digest."""
    found, now = [], 1.0
    while (now := max(now, gossip.next_wake())) < until:
        actions = gossip.tick(now)
        for ping in [message for message in sent(actions, at(B)) if isinstance(message, Ping)]:
            actions += says(gossip, B, Ack(ping.sequence, digest()), now=now)
        found += [now for _ in of(PushPullWith, actions)]
    return found


def test_a_peer_that_knows_the_same_is_seldom_asked() -> None:
    gossip = know(core(), B)
    regular = exchanges(gossip, lambda: gossip._anti_entropy.digest, until=1200.0)
    assert 3 <= len(regular) <= 6  # each tenth of about 40


def test_a_peer_that_tells_no_digest_is_asked_as_often_as_ever() -> None:
    gossip, found, now = know(core(), B), [], 1.0
    while (now := max(now, gossip.next_wake())) < 300.0:
        actions = gossip.tick(now)
        for ping in [message for message in sent(actions, at(B)) if isinstance(message, Ping)]:
            actions += gossip.tcp_pong(ping.sequence, now)
        found += of(PushPullWith, actions)
    assert 7 <= len(found) <= 13


def test_nothing_is_due_for_a_probe_that_was_answered() -> None:
    gossip, now = know(core(), B), 1.0
    wakes = []
    while (now := max(now, gossip.next_wake())) < 21.0:
        wakes.append(now)
        actions = gossip.tick(now)
        for ping in [message for message in sent(actions, at(B)) if isinstance(message, Ping)]:
            says(gossip, B, Ack(ping.sequence, gossip._anti_entropy.digest), now=now)
    # Two turns a second, one try in five seconds to reach the dead, and few others: none for a ping.
    assert len(wakes) <= 40 + 4 + 6
