"""Push-pull exchanges of whole states over TCP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from sollold.cluster.gossip import push_pull as push_pull_module
from sollold.cluster.gossip.actions import Action, Change, PersistedState, PushPullWith
from sollold.cluster.gossip.gossip import Gossip
from sollold.cluster.gossip.packet import Ack, Delta, Ping
from tests.cluster.gossip_core import (
    BOOT,
    ME,
    B,
    C,
    D,
    address_of,
    changes,
    core,
    exchange,
    mark_dead,
    only,
    receive,
    run,
    sent,
    with_members,
)


def test_a_push_pull_merges_both_states() -> None:
    first, second = with_members(core(ME), C), with_members(core(B, boot=3), D)
    first.update_record(replace(first.known.me, models="mine"), 1.0)
    second.update_record(replace(second.known.me, models="theirs"), 1.0)
    exchange(first, second, 2.0)
    assert first.known.record(B) == second.known.me
    assert second.known.record(ME) == first.known.me
    for gossip in (first, second):
        assert all(gossip.known.alive(node) for node in (ME, B, C, D))


@pytest.mark.parametrize("opens", [True, False])
def test_records_that_exceed_one_body_follow_in_later_exchanges(
    monkeypatch: pytest.MonkeyPatch, opens: bool
) -> None:
    monkeypatch.setattr(push_pull_module, "_MAX_BYTES", 9000)
    first, second = core(ME), core(B, boot=3)
    nodes = [f"{number:016x}" for number in range(100, 109)]
    for node in nodes:
        writer = core(node, boot=4)
        writer.update_record(replace(writer.known.me, models="m" * 2000), 1.0)
        exchange(first, writer, 1.0)
    sides = (first, second) if opens else (second, first)
    rounds = 0
    while not all(second.known.record(node) == first.known.record(node) for node in nodes):
        rounds += 1
        body, turn, largest = sides[0].push_pull_open(), 1, 0
        while body:
            largest = max(largest, len(body))
            body, _ = sides[turn].push_pull(body, None, 2.0)
            turn = 1 - turn
        assert largest < 12_000
    assert rounds == 3


def test_equal_states_exchange_little() -> None:
    first, second = core(ME), core(B, boot=3)
    first.update_record(replace(first.known.me, models="m" * 5000), 1.0)
    exchange(first, second, 2.0)
    answer, _ = second.push_pull(first.push_pull_open(), address_of(ME), 3.0)
    assert len(answer) < 500


def test_dead_nodes_of_a_push_pull_become_suspects() -> None:
    first, second = with_members(core(ME), C), with_members(core(B, boot=3), C)
    mark_dead(second, C)
    actions = exchange(first, second, 2.0)
    assert (Change.SUSPECTED, C) in changes(actions)
    assert first.known.alive(C)


def test_a_restart_without_its_state_ends_above_the_old_version() -> None:
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


def test_a_record_received_over_tcp_is_gossiped() -> None:
    first, second = with_members(core(ME), C), core(B, boot=3)
    exchange(first, second, 2.0)
    deltas = [m for m in sent(run(first, 2.0, 3.0)) if isinstance(m, Delta) and m.node == B]
    assert deltas


def test_a_different_digest_starts_a_push_pull() -> None:
    gossip = with_members(core(), B)
    asked: list[Action] = []
    now = 0.5
    for _ in range(4):
        pings: list[Ping] = []
        while not pings:
            now = max(now, gossip.next_wake())
            pings = [message for message in sent(gossip.tick(now)) if isinstance(message, Ping)]
        asked += receive(gossip, B, Ack(pings[0].sequence, 12345), now=now)
    assert PushPullWith(B, (address_of(B),)) in asked


def test_a_failed_push_pull_is_retried_with_another_peer() -> None:
    gossip = with_members(core(), B, C)
    run(gossip, 1.0, 2.0)
    actions = gossip.push_pull_done(B, False, 2.0) + run(gossip, 2.0, 3.0)
    assert PushPullWith(C, (address_of(C),)) in actions


def exchanges(gossip: Gossip, digest: Callable[[], int], *, until: float) -> list[float]:
    """The times at which ``gossip`` opens an exchange with B, which answers each ping with ``digest()``."""
    times, now = [], 1.0
    while (now := max(now, gossip.next_wake())) < until:
        actions = gossip.tick(now)
        for ping in [message for message in sent(actions, address_of(B)) if isinstance(message, Ping)]:
            actions += receive(gossip, B, Ack(ping.sequence, digest()), now=now)
        times += [now for _ in only(PushPullWith, actions)]
    return times


def test_equal_digests_make_exchanges_rarer() -> None:
    gossip = with_members(core(), B)
    regular = exchanges(gossip, lambda: gossip._anti_entropy.digest, until=1200.0)
    assert 3 <= len(regular) <= 6  # one tenth of about 40


def test_exchanges_without_digests_keep_their_interval() -> None:
    gossip, push_pulls, now = with_members(core(), B), [], 1.0
    while (now := max(now, gossip.next_wake())) < 300.0:
        actions = gossip.tick(now)
        for ping in [message for message in sent(actions, address_of(B)) if isinstance(message, Ping)]:
            actions += gossip.tcp_pong(ping.sequence, now)
        push_pulls += only(PushPullWith, actions)
    assert 7 <= len(push_pulls) <= 13


def test_an_answered_probe_leaves_no_timer() -> None:
    gossip, now = with_members(core(), B), 1.0
    wakes = []
    while (now := max(now, gossip.next_wake())) < 21.0:
        wakes.append(now)
        actions = gossip.tick(now)
        for ping in [message for message in sent(actions, address_of(B)) if isinstance(message, Ping)]:
            receive(gossip, B, Ack(ping.sequence, gossip._anti_entropy.digest), now=now)
    # Two ticks per second, one attempt per 5 s to reach dead nodes, and a few others: none for a ping.
    assert len(wakes) <= 40 + 4 + 6
