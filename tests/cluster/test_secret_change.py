"""Changing the secret of a running cluster, and evicting members."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sollold.cluster.admission import admission, keyring
from sollold.cluster.admission.change import Refused, caught_up, obeyed, seen, settled, unsettled, used
from sollold.cluster.admission.exchange import AdmissionState
from sollold.cluster.admission.keyring import Admitted, Keyring, KeyringFile, KeyringMember
from sollold.cluster.admission.orders import DoorOrder, SecretAnswer, SecretOrder, Step, secret_of
from sollold.cluster.admission.policy import Standing, behind
from sollold.cluster.gossip.config import LAN
from sollold.cluster.gossip.gossip import Gossip
from sollold.cluster.net.dialer import Dialer
from sollold.cluster.net.identity import Identity, Tokens
from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_client import RpcClient
from sollold.cluster.net.rpc_server import RpcServer
from sollold.control import secret_change
from sollold.control.admission import AdmissionService
from sollold.errors import Refusal
from sollold.settings.schema import ClusterSettings
from tests.cluster.lan import SORTED, Lan
from tests.doubles import until
from tests.keys import key

A, B, C = "a" * 16, "b" * 16, "c" * 16
RING = Keyring("11" * 32, A, 0.0, alone=False)
OPEN = Keyring.for_open()


def order(step: Step, generation: int = 1, secret: str = "22" * 32, **more: Any) -> SecretOrder:
    return replace(SecretOrder(step, A, generation, secret), **more)


# A single keyring


def test_a_new_secret_is_accepted_then_used_then_exclusive() -> None:
    ring = obeyed(RING, order(Step.INSTALL), B)
    assert (ring.secret, len(ring.tokens.accepted)) == (RING.secret, 2)
    ring = obeyed(ring, order(Step.USE), B)
    assert (ring.secret, ring.generation, ring.old) == ("22" * 32, 1, (RING.secret,))
    ring = obeyed(ring, order(Step.REMOVE), B)
    assert ring.tokens.accepted == (bytes.fromhex("22" * 32),)


def test_the_last_step_of_a_change_may_arrive_during_the_next() -> None:
    ring = obeyed(obeyed(RING, order(Step.INSTALL), B), order(Step.USE), B)
    ring = obeyed(ring, order(Step.INSTALL, 2, "33" * 32), B)
    ring = obeyed(ring, order(Step.REMOVE), B)
    assert ring.tokens.accepted == (bytes.fromhex("22" * 32), bytes.fromhex("33" * 32))


@given(st.lists(st.sampled_from(list(Step)), max_size=8))
def test_steps_may_be_repeated_late_or_missing(steps: list[Step]) -> None:
    """The secret in use is always accepted, and the former one until the last step."""
    ring = RING
    for step in steps:
        try:
            after = obeyed(ring, order(step), B)
        except Refused:
            assert step is Step.REMOVE and ring.secret == RING.secret
            continue
        assert obeyed(after, order(step), B) == after
        assert RING.secret in (after.secret, *after.old) or step is Step.REMOVE or not ring.old
        ring = after
    assert ring.secret == ("22" * 32 if Step.USE in steps else RING.secret)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (replace(order(Step.INSTALL), founder=B), "another cluster"),
        (order(Step.INSTALL, 2**39), "does not follow"),
        (order(Step.INSTALL, 0), "in use"),
        (order(Step.USE, 0), "in use"),
        (order(Step.REMOVE), "still uses generation 0"),
        (order(Step.INSTALL, evicted=(KeyringMember(B, "b"),)), "evicts this node"),
    ],
)
def test_invalid_orders_are_refused(wrong: SecretOrder, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        obeyed(RING, wrong, B)


def test_the_same_one_of_two_concurrent_changes_wins_in_any_order() -> None:
    low, high = order(Step.INSTALL, secret="22" * 32), order(Step.INSTALL, secret="33" * 32)
    first = obeyed(obeyed(RING, low, B), high, B)
    with pytest.raises(Refused):
        obeyed(obeyed(RING, high, B), low, B)
    assert first.pending is not None and first.pending.secret == "33" * 32


def test_an_evicted_node_is_refused_from_the_first_step_on() -> None:
    ring = replace(
        RING,
        members=(KeyringMember(B, "b"), KeyringMember(C, "c")),
        admitted=(Admitted(C, "c", "door", 0.0),),
    )
    evicts = order(Step.INSTALL, members=(KeyringMember(B, "b"),), evicted=(KeyringMember(C, "c"),))
    ring = obeyed(ring, evicts, B)
    assert ring.refused == {C} and C not in ring.known
    assert settled(ring).refused == frozenset(), "an abandoned change evicts nobody"
    ring = obeyed(ring, replace(evicts, step=Step.USE), B)
    assert ring.known == {A, B} and ring.evicted == (KeyringMember(C, "c"),)
    assert seen(ring, [(C, "c"), (B, "b")]) is ring
    assert obeyed(ring, order(Step.REMOVE), B).refused == frozenset(), "the eviction is lifted"


def test_an_open_cluster_becomes_closed() -> None:
    ring = seen(OPEN, [(C, "a stranger")])
    for step in Step:
        ring = obeyed(ring, order(step, members=(KeyringMember(B, "b"),)), B)
    assert ring.known == {A, B}
    assert (ring.founder, ring.open, ring.secured, ring.closed) == (A, False, True, True)
    assert ring.age() > 10**9


def test_a_fetched_keyring_keeps_the_nodes_own_history() -> None:
    ring = replace(RING, admitted=(Admitted(C, "c", "door", 0.0),), members=(KeyringMember(C, "c"),))
    fetched = Keyring("22" * 32, A, 5.0, generation=3, members=(KeyringMember(B, "b"),))
    ring = caught_up(ring, fetched)
    assert (ring.secret, ring.generation, ring.founded) == ("22" * 32, 3, 0.0)
    assert ring.known == {A, B, C} and not ring.closed
    assert caught_up(ring, replace(fetched, closed=True)).closed, "the door was closed meanwhile"
    assert caught_up(replace(ring, closed=True), fetched).closed


def test_keyrings_of_earlier_releases_can_be_read(tmp_path: Path) -> None:
    old = {"secret": "11" * 32, "founder": A, "founded": 1.0, "alone": False, "admitted_by": A}
    (tmp_path / "keyring").write_bytes(msgspec.json.encode(old))
    ring = KeyringFile(tmp_path).load(B)
    assert ring.generation == 0 and ring.members == () and ring.known == {A}


def test_a_keyring_that_closed_an_open_cluster_overrides_the_setting(tmp_path: Path) -> None:
    settings = ClusterSettings(door="open")
    KeyringFile(tmp_path).write(RING)
    assert secret_of(settings, tmp_path, B)[0].open
    pending = obeyed(OPEN, order(Step.INSTALL), B).pending
    assert pending is not None
    secured = used(OPEN, pending)
    KeyringFile(tmp_path).write(secured)
    tokens, ring = secret_of(settings, tmp_path, B)
    assert not tokens.open and ring == settled(secured)


def standing(node: str, generation: int, cluster: str, founder: str = A) -> Standing:
    return Standing(node, node, cluster, founder, 1e9, False, False, generation)


@pytest.mark.parametrize(
    ("mine", "theirs", "expected"),
    [
        (standing(B, 1, "x"), standing(C, 2, "y"), True),
        (standing(B, 2, "x"), standing(C, 1, "y"), False),
        (standing(B, 1, "x"), standing(C, 1, "x"), False),
        (standing(B, 1, "x"), standing(C, 1, "y"), True),
        (standing(B, 1, "y"), standing(C, 1, "x"), False),
        (standing(B, 1, "x"), standing(C, 2, "y", founder=B), False),
        (standing(B, 1, "x"), standing("d" * 16, 2, "y"), False),
    ],
)
def test_a_node_with_an_older_secret_is_behind(mine: Standing, theirs: Standing, expected: bool) -> None:
    assert behind(mine, theirs, {A, C}) is expected


# Nodes on loopback addresses


@pytest.fixture
def fast_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter intervals for discovery and leader election."""
    monkeypatch.setattr(admission, "LOOK_SECONDS", 0.05)
    # A slow machine must not count as away.
    monkeypatch.setattr(secret_change, "_STEP_SECONDS", 15.0)
    tuning = replace(LAN, grace=0.3, settle=0.1, patience=0.3)
    defaults = Gossip.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "tuning", tuning)


@pytest.fixture
async def lan(tmp_path: Path, fast_timing: None) -> AsyncIterator[Lan]:
    lan = Lan(tmp_path)
    await lan.start(0)
    for number in (1, 2):
        await lan.start(number, 0)
    await until(lan.led, 30)
    for number in range(3):
        # The first hour is over.
        ring = lan.ring(number)
        lan.admission(number).ring = replace(ring, founded=1.0)
    yield lan
    await lan.close()


def links(lan: Lan, *numbers: int) -> dict[tuple[int, str], object]:
    """The standing links between these nodes."""
    nodes = {lan.running[number].me.node for number in numbers}
    return {
        (number, node): link
        for number in numbers
        for node, link in lan.running[number]._links._links.items()
        if node in nodes
    }


def leader(lan: Lan, *numbers: int) -> int:
    """The number of the leader."""
    leader_id = lan.running[(numbers or (0,))[0]].leader().leader
    return next(number for number, node in lan.running.items() if node.me.node == leader_id)


def connected(lan: Lan, number: int, host: str) -> list[object]:
    """The connections between a node and ``host``, opened by either side."""
    node = lan.running[number]
    mine = [raw for raw in node.reach.sockets._all if raw.fileno() >= 0 and raw.getpeername()[0] == host]
    theirs = [
        transport
        for transports in node._peers._connections.values()
        for transport in transports
        if not transport.is_closing() and transport.get_extra_info("peername")[0] == host
    ]
    return [*mine, *theirs]


async def test_rotating_the_secret_keeps_all_connections(lan: Lan) -> None:
    await until(lambda: len(links(lan, 0, 1, 2)) == 6)
    before, secret = links(lan, 0, 1, 2), lan.ring(0).secret
    for generation, number in ((1, 0), (2, 1), (3, 2)):
        rolled = await lan.changes[number].rotate()
        assert (rolled.generation, len(rolled.done)) == (generation, 3)
        assert rolled.away == rolled.unsure == ()
        assert lan.settled() and lan.ring(0).secret != secret
        secret = lan.ring(0).secret
    await asyncio.sleep(0.2)
    assert links(lan, 0, 1, 2) == before and lan.led()
    for number in range(3):
        await lan.stop(number)
    for number in range(3):
        await lan.start(number)
    await until(lan.joined, 30)
    assert lan.ring(2).secret == secret


async def test_a_holder_of_the_former_secret_alone_loses_its_connections(lan: Lan) -> None:
    """It never took part in the cluster, so no admin can see and evict it."""
    thief = Identity(key(9), Tokens.read(lan.ring(0).secret))
    there = lan.running[0].me.node
    calls = RpcClient(Dialer(thief, lambda node: [("127.0.0.1", lan.ports[0])]), RpcServer(thief))
    assert await calls.call(there, "door", DoorOrder(0), bool, timeout=3)
    assert not (await lan.changes[leader(lan)].rotate()).refusal
    with pytest.raises(PeerError):
        await calls.call(there, "door", DoorOrder(0), bool, timeout=3)
    await calls.close()


async def test_a_secret_that_could_not_be_used_at_first_is_used_later(
    lan: Lan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Making the new certificate fails once at a follower, in the last step."""
    follower = next(number for number in range(3) if number != leader(lan))
    identity = lan.running[follower]._identity
    change, made = identity.change_tokens, 0

    def failing_once(tokens: Tokens) -> None:
        nonlocal made
        made += 1
        if made == 3:
            raise OSError(24, "Too many open files")
        change(tokens)

    monkeypatch.setattr(identity, "change_tokens", failing_once)
    await lan.changes[leader(lan)].rotate()
    await until(lambda: made > 3 and lan.settled())
    assert identity.tokens == lan.ring(follower).tokens
    await until(lan.led)


async def test_an_interrupted_change_completes_by_itself(lan: Lan, monkeypatch: pytest.MonkeyPatch) -> None:
    """All nodes have the next secret and one uses it, but no leader continues the change."""
    monkeypatch.setattr(admission, "_SETTLE_SECONDS", 0.5)
    founder = lan.ring(0).founder
    install = SecretOrder(Step.INSTALL, founder, 1, "22" * 32, lan.ring(0).members)
    for number in range(3):
        await lan.admission(number).obey(install)
    await lan.admission(1).obey(replace(install, step=Step.USE))
    await until(lambda: all(lan.ring(number).secret == "22" * 32 for number in range(3)))
    await until(lan.settled)
    assert lan.led()
    # Another change stops after its first step at one node; rotating again must supersede it. The long
    # settle time keeps it from ending by itself first.
    monkeypatch.setattr(admission, "_SETTLE_SECONDS", 60.0)
    other = next(number for number in range(3) if number != leader(lan))
    await lan.admission(other).obey(replace(install, generation=7))
    rolled = await lan.changes[other].rotate()
    assert rolled.generation == 8 and lan.settled() and lan.led()


async def test_invalid_rotations_and_evictions_are_refused(lan: Lan) -> None:
    lead = leader(lan)
    other, third = (number for number in range(3) if number != lead)
    install = SecretOrder(Step.INSTALL, lan.ring(0).founder, 1, "22" * 32)
    victim = lan.running[third].me.node
    answer = await lan.running[other].calls.call(victim, "secret", install, SecretAnswer, timeout=3)
    assert answer.again and "leads here" in answer.refusal
    assert not unsettled(lan.ring(third))
    with pytest.raises(Refusal, match="itself"):
        await lan.changes[1].evict(lan.running[1].me.name)
    with pytest.raises(Refusal, match="no member is named 'x'; members: m0, m1, m2"):
        await lan.changes[1].evict("x")


async def test_an_evicted_member_is_removed_at_once_and_needs_an_admin_to_return(lan: Lan) -> None:
    lead = leader(lan)
    stay, out = (number for number in range(3) if number != lead)
    gone, kept = lan.running[out], (lead, stay)
    await until(lambda: len(links(lan, *kept)) == 2)
    before, secret = links(lan, *kept), lan.ring(0).secret
    began = time.monotonic()
    member, rolled = await lan.changes[stay].evict(gone.me.name)
    assert member.node == gone.me.node and len(rolled.done) == 2
    await until(lambda: lan.led(*kept))
    # A node that is only silent is considered alive for longer.
    assert time.monotonic() - began < 3.5
    assert links(lan, *kept) == before
    where = gone.me.addresses[0]
    assert not any(connected(lan, number, where) for number in kept)
    assert lan.settled(*kept) and lan.ring(lead).secret != secret == lan.ring(out).secret
    # The evicted node reports its eviction, and an open door does not admit it.
    await lan.running[lead].calls.call(lan.running[lead].me.node, "door", DoorOrder(600), bool, timeout=3)
    await until(lambda: "was evicted" in gone.me.seeking, 30)
    await until(lambda: any(lan.running[number].me.waiting for number in kept))
    assert lan.joined(*kept) and lan.ring(out).secret == secret
    states = {str(row["name"]): row["state"] for row in lan.changes[lead].members()}
    assert states[gone.me.name] == "evicted"
    service = AdmissionService(lan.running[stay], lan.running[stay].calls, lan.changes[stay])
    await until(lambda: any(record.waiting for record in lan.running[stay].live()))
    assert (await service.admit(gone.me.name)).evicted
    await until(lan.led, 30)
    assert lan.settled() and not lan.ring(lead).evicted


async def test_an_evicted_node_that_admits_a_machine_answers_requests_again(lan: Lan) -> None:
    lead = leader(lan)
    out = next(number for number in range(3) if number != lead)
    gone = lan.running[out]
    await lan.changes[lead].evict(gone.me.name)
    await until(lambda: "was evicted" in gone.me.seeking, 30)
    admission = gone.admission
    assert admission is not None
    assert admission.answer(SORTED[4].public, "other", "").state is AdmissionState.BUSY
    admission.let_in(SORTED[3].node, "invited", "invitation")
    assert not gone.me.seeking
    await until(lambda: admission.answer(SORTED[4].public, "other", "").state is not AdmissionState.BUSY)


async def test_the_leader_can_be_evicted(lan: Lan) -> None:
    out = leader(lan)
    kept = [number for number in range(3) if number != out]
    _, rolled = await lan.changes[kept[1]].evict(lan.running[out].me.node)
    assert len(rolled.done) == 2
    await until(lambda: lan.led(*kept))
    assert lan.settled(*kept) and lan.ring(out).generation == 0
    assert leader(lan, *kept) == min(kept), "the lowest id leads next"


async def test_a_rotation_waits_for_the_next_leader(lan: Lan) -> None:
    """The leader leaves during the rotation or shortly before it."""
    gone = leader(lan)
    kept = [number for number in range(3) if number != gone]
    name = lan.running[gone].me.name
    async with asyncio.TaskGroup() as group:
        group.create_task(lan.stop(gone))
        rolled = group.create_task(lan.changes[kept[1]].rotate())
    assert len(rolled.result().done) >= 2
    rolled_again = await lan.changes[kept[0]].rotate()
    assert len(rolled_again.done) == 2 and [member.name for member in rolled_again.away] == [name]


async def test_concurrent_rotations_run_one_after_the_other(lan: Lan) -> None:
    async with asyncio.TaskGroup() as group:
        rotations = [group.create_task(lan.changes[number].rotate()) for number in (1, 2)]
    assert [len(rotation.result().done) for rotation in rotations] == [3, 3]
    await until(lan.settled)
    assert lan.ring(0).generation == 2


async def test_a_node_that_was_away_fetches_the_secret_with_its_key(lan: Lan) -> None:
    away = next(number for number in range(3) if number != leader(lan))
    here = [number for number in range(3) if number != away]
    name = lan.running[away].me.name
    await lan.stop(away)
    await until(lambda: lan.led(*here))
    rolled = await lan.changes[here[0]].rotate()
    assert [member.name for member in rolled.away] == [name]
    await lan.start(away)
    await until(lan.led, 30)
    assert lan.settled() and lan.ring(away).generation == 1
    # A node that is evicted while it is away stays out.
    await lan.stop(away)
    await until(lambda: lan.led(*here))
    await lan.changes[here[0]].evict(name)
    back = await lan.start(away)
    await until(lambda: "was evicted" in back.me.seeking)
    assert lan.joined(*here) and lan.ring(away).generation == 1


async def test_an_open_cluster_gets_a_secret_without_a_restart(tmp_path: Path, fast_timing: None) -> None:
    lan = Lan(tmp_path, door="open")
    try:
        await lan.start(0)
        for number in (1, 2):
            await lan.start(number, 0)
        await until(lan.led, 30)
        with pytest.raises(Refusal, match="secure"):
            await lan.changes[1].rotate()
        stay = [leader(lan), next(number for number in range(3) if number != leader(lan))]
        out = next(number for number in range(3) if number not in stay)
        nodes = [lan.running[number].me.node for number in stay]
        with pytest.raises(Refusal, match="leads"):
            await lan.changes[out].secure(nodes[1:])
        rolled = await lan.changes[stay[1]].secure(nodes)
        assert len(rolled.done) == 2 and rolled.away == ()
        await until(lambda: lan.led(*stay), 30)
        assert lan.settled(*stay) and not any(lan.running[number].me.open for number in stay)
        assert lan.running[out].me.open
        # It stays closed after a restart despite the setting; former members are not admitted.
        for number in stay:
            await lan.stop(number)
        for number in stay:
            await lan.start(number)
        await until(lambda: lan.joined(*stay), 30)
        assert SORTED[out].node not in {record.node for record in lan.running[stay[0]].live()}
    finally:
        await lan.close()


async def test_an_open_cluster_stays_open_if_a_node_cannot_save_the_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast_timing: None
) -> None:
    """Otherwise that node would be open again after its next start."""
    lan = Lan(tmp_path, door="open")
    try:
        await lan.start(0)
        await lan.start(1, 0)
        await until(lambda: lan.led(0, 1), 30)
        full = lan.running[1].me.name
        states = {number: lan.admission(number)._file._path.parent for number in (0, 1)}
        monkeypatch.setattr(
            keyring, "why_not_writable", lambda folder: "No space left on device" * (folder == states[1])
        )
        nodes = [lan.running[number].me.node for number in (0, 1)]
        with pytest.raises(Refusal, match=f"{full}: it could not save the secret: .*No space left on device"):
            await lan.changes[0].secure(nodes)
        assert lan.running[0].me.open and lan.running[1].me.open
        monkeypatch.undo()
        assert len((await lan.changes[0].secure(nodes)).done) == 2
    finally:
        await lan.close()
