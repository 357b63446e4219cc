"""Founding a cluster, admission, and the refusal of unknown machines."""

from __future__ import annotations

import asyncio
import itertools
import math
import ssl
import stat
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import msgspec
import pytest

from sollold.cluster.admission import admission, search
from sollold.cluster.admission.calls import AdmissionCalls
from sollold.cluster.admission.exchange import (
    AdmissionState,
    Answer,
    Greeting,
    Hello,
    Request,
    applicant,
    ask,
    decoded,
    greet,
    request_content,
)
from sollold.cluster.admission.keyring import MAX_MEMBERS, Keyring, KeyringFile, KeyringMember
from sollold.cluster.admission.orders import AdmitOrder, DoorOrder, door_seconds, secret_of
from sollold.cluster.admission.policy import FIRST_HOUR, Standing, asks, code_of, preferred
from sollold.cluster.admission.waiting import WaitingList
from sollold.cluster.gossip.record import WaitingMachine
from sollold.cluster.net import acceptor
from sollold.cluster.net.dialer import Dialer
from sollold.cluster.net.framing import frame
from sollold.cluster.net.identity import JOIN, Identity, Tokens
from sollold.cluster.net.push_pull_stream import SYNC, FrameClient
from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_server import HTTP, LINK, TUNNEL
from sollold.settings.schema import ClusterSettings
from tests.cluster.lan import Lan
from tests.doubles import until
from tests.keys import key

# Which node asks the other for admission


def standing(node: str, *, cluster: str = "", age: float = 0.0, alone: bool = True) -> Standing:
    return Standing(node, node, cluster or node, cluster or node, age, alone, age < FIRST_HOUR)


OLD = 2 * FIRST_HOUR


@pytest.mark.parametrize(
    ("mine", "theirs", "expected"),
    [
        (standing("b"), standing("a"), True),
        (standing("a"), standing("b"), False),
        (standing("b", cluster="x"), standing("a", cluster="x"), False),
        (standing("a"), standing("c", cluster="b", alone=False), True),
        (standing("c", cluster="b", alone=False), standing("a"), False),
        (standing("a"), standing("z", cluster="z", age=OLD, alone=False), True),
        (standing("z", cluster="z", age=OLD, alone=False), standing("a"), False),
        (standing("a", age=OLD), standing("b"), False),
        (standing("b", cluster="b", alone=False), standing("c", cluster="a", alone=False), True),
        (standing("b", cluster="b", alone=False), standing("z", cluster="z", age=OLD), False),
        (standing("a", age=OLD), standing("z", age=OLD), False),
    ],
)  # fmt: skip
def test_which_node_asks_the_other(mine: Standing, theirs: Standing, expected: bool) -> None:
    assert asks(mine, theirs) is expected


def test_a_waiting_node_asks_only_the_cluster_where_it_waits() -> None:
    mine = standing("a", age=OLD)
    assert asks(mine, standing("z", cluster="z", age=OLD, alone=False), "z")
    assert not asks(mine, standing("y", cluster="y", age=OLD, alone=False), "z")
    assert not asks(mine, replace(standing("y", age=OLD, alone=False), founder=""))


def test_two_nodes_never_ask_each_other() -> None:
    kinds = [
        standing(node, cluster=cluster, age=age, alone=alone)
        for node, cluster, age, alone in itertools.product("abc", "xyz", (0.0, OLD), (True, False))
    ]
    assert not [(a, b) for a in kinds for b in kinds if asks(a, b) and asks(b, a)]


def test_an_established_cluster_is_preferred_then_several_nodes_then_the_lowest_founder() -> None:
    old, low, high = standing("z", age=OLD, alone=False), standing("a"), standing("b")
    several = standing("y", cluster="y", alone=False)
    assert preferred([high, several, old, low]) is old
    assert preferred([high, several, low]) is several
    assert preferred([high, low]) is low
    assert preferred([low, later := replace(low, node="b", generation=1)]) is later


def test_codes_differ_and_are_short() -> None:
    codes = {code_of(key(number).public) for number in range(20)}
    assert len(codes) == 20 and all(len(code) == 9 for code in codes)


def test_a_founding_time_in_the_future_opens_no_door() -> None:
    assert replace(Keyring.found("a"), founded=time.time() + 600).age() == float("inf")


def test_an_answer_that_is_no_text_is_an_error_of_the_node() -> None:
    """It would end the search for a cluster, in which any machine of the LAN may answer."""
    body = msgspec.msgpack.encode(("waiting", "ab")).replace(b"ab", b"\xff\xff")
    with pytest.raises(PeerError, match="its answer is invalid"):
        decoded(body, Answer)


async def test_setting_the_clock_does_not_age_a_cluster(lan: Lan, monkeypatch: pytest.MonkeyPatch) -> None:
    """A computer without a battery-backed clock starts with an old time until NTP sets it."""
    first, real, ahead = await lan.start(0), time.time, 0.0
    monkeypatch.setattr(time, "time", lambda: real() + ahead)
    for years in (3, -1):
        founded, ahead = lan.ring(0).founded, years * 366 * 86400.0
        await until(partial(lambda before: lan.ring(0).founded != before, founded))
        assert 0 <= lan.ring(0).age() < 60
    assert first.me.door_until
    await lan.start(1, 0)
    await until(lan.joined)


async def test_a_clock_that_is_set_after_a_restart_does_not_change_the_founding(
    lan: Lan, monkeypatch: pytest.MonkeyPatch
) -> None:
    await lan.start(0)
    founded, real, ahead = lan.ring(0).founded, time.time, -50 * 366 * 86400.0
    await lan.stop(0)
    monkeypatch.setattr(time, "time", lambda: real() + ahead)
    first = await lan.start(0)
    assert not first.me.door_until
    ahead = 0.0
    await until(lambda: first.me.door_until)
    assert lan.ring(0).founded == founded


def test_a_keyring_readable_by_others_is_made_private(tmp_path: Path) -> None:
    settings = ClusterSettings(door="1h")
    secret_of(settings, tmp_path, "a" * 16)
    (tmp_path / "keyring").chmod(0o644)
    secret_of(settings, tmp_path, "a" * 16)
    assert stat.S_IMODE((tmp_path / "keyring").stat().st_mode) == 0o600


def test_a_keyring_of_root_with_wide_permissions_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    settings = ClusterSettings(door="1h")
    created = secret_of(settings, tmp_path, "a" * 16)
    (tmp_path / "keyring").chmod(0o644)
    monkeypatch.setattr(Path, "chmod", refuse)
    assert secret_of(settings, tmp_path, "a" * 16) == created
    assert "sudo chmod 600" in caplog.text


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b'{"secret": "ab", "founder": "a", "founded": 1}', b"\xff", b'{"secret": "\xff"}', bytes(64)],
)
def test_a_damaged_keyring_does_not_open_the_cluster(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: bytes
) -> None:
    (tmp_path / "keyring").write_bytes(damage)
    tokens, ring = secret_of(ClusterSettings(door="1h"), tmp_path, "a" * 16)
    assert not tokens.open and ring is not None and ring.alone
    assert "asks members that know it" in caplog.text
    assert (tmp_path / "keyring.unread").read_bytes() == damage
    # The keyring may have closed a cluster that the settings opened.
    (tmp_path / "keyring").write_bytes(damage)
    tokens, ring = secret_of(ClusterSettings(door="open"), tmp_path, "a" * 16)
    assert not tokens.open and ring is not None and ring.closed and ring.alone
    assert "delete that file and restart" in caplog.text
    assert secret_of(ClusterSettings(door="open"), tmp_path, "a" * 16) == (tokens, ring)


@pytest.mark.parametrize("age", [math.nan, math.inf, -math.inf, -1.0])
def test_an_impossible_age_of_a_cluster_leaves_the_keyring_readable(tmp_path: Path, age: float) -> None:
    file = KeyringFile(tmp_path)
    file.write(Answer(AdmissionState.ADMITTED, "ab" * 32, "0" * 16, age).keyring("a"))
    assert file.read() is not None


def test_only_the_owner_can_read_the_keyring(tmp_path: Path) -> None:
    settings = ClusterSettings(door="1h")
    tokens, ring = secret_of(settings, tmp_path, "a" * 16)
    assert ring is not None and secret_of(settings, tmp_path, "a" * 16) == (tokens, ring)
    assert stat.S_IMODE((tmp_path / "keyring").stat().st_mode) == 0o600
    assert not tokens.open and ring.founder == "a" * 16


def test_a_token_and_an_open_cluster_have_no_keyring(tmp_path: Path) -> None:
    assert secret_of(ClusterSettings(token="ab" * 32, door="1h"), tmp_path, "a" * 16)[1] is None
    tokens, ring = secret_of(ClusterSettings(door="open"), tmp_path, "a" * 16)
    assert tokens.open and ring is not None and ring.open
    assert not (tmp_path / "keyring").exists()


@pytest.mark.parametrize(("text", "seconds"), [("closed", 0.0), ("1h", 3600.0), ("90", 90.0)])
def test_the_door_setting_is_parsed(text: str, seconds: float) -> None:
    assert door_seconds(text) == seconds


# Nodes on loopback addresses


@pytest.fixture
async def lan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Lan]:
    monkeypatch.setattr(admission, "LOOK_SECONDS", 0.05)
    lan = Lan(tmp_path)
    yield lan
    await lan.close()


async def test_a_machine_that_admits_another_before_it_could_join_a_cluster_stays(
    lan: Lan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was admitted to the cluster while it waited for a change of its own secret to end."""
    asked = asyncio.Event()
    member = key(1).node

    async def greeted(*args: object) -> tuple[Standing, tuple[str, int]]:
        return Standing(member, "member", "there", member, 1e6, False, True), ("10.0.0.1", 1)

    async def ask(*args: object) -> Answer:
        asked.set()
        return Answer(AdmissionState.ADMITTED, "ab" * 32, member, 1e6)

    await lan.start(0)
    own, own_ring = lan.admission(0), lan.ring(0)
    # Held during each step of a change of the secret.
    async with own._steps:
        monkeypatch.setattr(search, "greeted", greeted)
        monkeypatch.setattr(search, "ask", ask)
        monkeypatch.setattr(own.search, "_targets", lambda: [()])
        looking = asyncio.create_task(own.search.look(own.standing()))
        await asked.wait()
        own.let_in(key(2).node, "other", "invitation")
    await looking
    assert (lan.ring(0).founder, lan.ring(0).secret) == (own_ring.founder, own_ring.secret)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
async def test_a_second_machine_is_admitted_automatically(lan: Lan, order: tuple[int, int]) -> None:
    """Only the second knows the address of the first, whichever has to ask."""
    first = await lan.start(order[0])
    second = await lan.start(order[1], order[0])
    await until(lan.joined)
    assert len({lan.ring(number).secret for number in (0, 1)}) == 1
    assert sorted([first.me.admitted_by, second.me.admitted_by])[0] == ""
    assert {first.me.admitted_by, second.me.admitted_by} & {first.me.node, second.me.node}
    assert first.leader().leader == second.leader().leader or not first.leader().leader
    # They rejoin after a restart of both without being admitted again.
    secret = lan.ring(0).secret
    for number in (0, 1):
        await lan.stop(number)
    await asyncio.gather(lan.start(order[0]), lan.start(order[1], order[0]))
    await until(lan.joined)
    assert lan.ring(0).secret == lan.ring(1).secret == secret


async def test_clusters_founded_at_the_same_moment_merge(lan: Lan) -> None:
    for number in range(4):  # ports for all, so that each can have all others as seeds
        await lan.start(number)
    for number in range(4):
        await lan.stop(number)
    for file in lan.folder.glob("*/keyring"):
        file.unlink()
    for file in lan.folder.glob("*/peers.json"):
        file.unlink()
    await asyncio.gather(*(lan.start(number, *(set(range(4)) - {number})) for number in range(4)))
    await until(lan.joined, 30)
    founders = {lan.ring(number).founder for number in range(4)}
    assert len(founders) == 1 and founders < {node.me.node for node in lan.running.values()}


async def test_a_machine_waits_for_admission_while_the_door_is_closed(lan: Lan) -> None:
    first = await lan.start(0, door="closed")
    second = await lan.start(1, 0, door="closed")
    older, newer = first, second
    # Both are new, so the node with the higher id asks; the door of the other is closed.
    await until(lambda: older.me.waiting and newer.me.seeking)
    waiting = older.me.waiting[0]
    assert (waiting.node, waiting.name) == (newer.me.node, newer.me.name)
    assert waiting.code in newer.me.seeking and older.me.name in newer.me.seeking
    await asyncio.sleep(0.3)
    assert len(first.live()) == len(second.live()) == 1
    assert lan.ring(0).secret != lan.ring(1).secret
    # An admin admits it on the machine where it waits.
    began = time.monotonic()
    assert await older.calls.call(older.me.node, "admit", AdmitOrder(newer.me.node), bool, timeout=3)
    await until(lan.joined)
    assert time.monotonic() - began < 5
    await until(lambda: not older.me.waiting and not newer.me.seeking)
    assert newer.me.admitted_by == older.me.node


async def test_a_machine_that_waits_for_long_survives_a_change_of_the_secret(lan: Lan) -> None:
    first = await lan.start(0, door="closed")
    second = await lan.start(1, 0, door="closed")
    await until(lambda: first.me.waiting and lan.led(0))
    waiting = second.admission
    assert waiting is not None
    waiting.ring = replace(waiting.ring, founded=time.time() - OLD)
    assert not (await lan.changes[0].rotate()).refusal
    assert await first.calls.call(first.me.node, "admit", AdmitOrder(second.me.node), bool, timeout=3)
    await until(lan.joined)


async def test_the_name_of_a_strange_machine_is_made_printable(lan: Lan) -> None:
    first = await lan.start(0, door="closed")
    assert first.admission is not None
    first.admission._name = "a\n\x1b[2J" + "b" * 50
    second = await lan.start(1, 0, door="closed")
    await until(lambda: second.me.seeking)
    assert second.me.seeking.isprintable() and len(second.me.seeking) < 200


async def test_an_admin_can_open_the_door(lan: Lan) -> None:
    first = await lan.start(0, door="closed")
    second = await lan.start(1, 0, door="closed")
    assert first.me.node < second.me.node
    await until(lambda: first.me.waiting)
    assert first.me.door_until == 0
    await first.calls.call(first.me.node, "door", DoorOrder(600), bool, timeout=3)
    assert first.me.door_until > time.time() + 500
    await until(lan.joined)


async def test_a_door_that_closes_by_itself_is_reported_closed(lan: Lan) -> None:
    first = await lan.start(0, door="1s")
    await until(lambda: first.me.door_until)
    await until(lambda: not first.me.door_until)


async def test_an_admin_can_close_the_door_for_good(lan: Lan) -> None:
    first = await lan.start(0)
    await first.calls.call(first.me.node, "door", DoorOrder(0), bool, timeout=3)
    assert first.me.door_until == 0
    second = await lan.start(1, 0)
    await until(lambda: first.me.waiting and second.me.seeking)
    await lan.stop(0)
    first = await lan.start(0)
    await until(lambda: first.me.waiting)
    assert len(first.live()) == 1


async def test_a_node_admitted_later_does_not_reopen_the_door(lan: Lan) -> None:
    first = await lan.start(0)
    await first.calls.call(first.me.node, "door", DoorOrder(0), bool, timeout=3)
    second = await lan.start(1, 0)
    await until(lambda: first.me.waiting)
    await first.calls.call(first.me.node, "admit", AdmitOrder(second.me.node), bool, timeout=3)
    await until(lan.joined)
    assert lan.ring(1).age() < 3600 and lan.ring(1).closed and not second.me.door_until
    third = await lan.start(2, 1)
    await until(lambda: second.me.waiting and third.me.seeking)
    assert len(second.live()) == 2


async def test_an_established_cluster_does_not_join_a_newcomer(lan: Lan) -> None:
    """After its first hour it does not join the cluster of a newcomer with a lower id."""
    first = await lan.start(1)
    ring = replace(lan.ring(1), founded=time.time() - 2 * FIRST_HOUR)
    await lan.stop(1)
    await asyncio.to_thread(KeyringFile(lan.folder / "state1").write, ring)
    second = await lan.start(0)
    first = await lan.start(1, 0)
    assert second.me.node < first.me.node
    await asyncio.sleep(0.5)
    assert lan.ring(1).secret == ring.secret and len(first.live()) == 1


async def test_a_stranger_can_only_request_admission(lan: Lan) -> None:
    """Without a certificate of the cluster, all protocols except the admission request are refused."""
    member = await lan.start(0, door="closed")
    stranger = Identity(key(7), Tokens.read("cd" * 32))
    where = (member.me.addresses[0], member.port)
    for protocol in (HTTP, SYNC, LINK, TUNNEL):
        bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        bare.check_hostname, bare.verify_mode = False, ssl.CERT_NONE
        bare.set_alpn_protocols([protocol])
        foreign = stranger.client_context(protocol, anyone=True)
        foreign.verify_mode = ssl.CERT_NONE
        for context in (bare, foreign):
            assert await _response_to(context, where) == b""
    reach = Dialer(stranger, lambda node: [])
    greeting, _ = await greet(reach, 1, (where,))
    assert greeting.node == member.me.node
    assert lan.ring(0).secret not in repr(greeting)
    answer = await ask(reach, key(7), "x", 1, greeting.node, where)
    assert answer.state is AdmissionState.WAITING and answer.secret == ""


def test_a_machine_with_many_keys_does_not_hide_other_machines() -> None:
    waiting = WaitingList()
    shown = [
        waiting.add(WaitingMachine(f"{n:016x}", "gpu-box", code_of(bytes(32))), "10.0.0.9", 0.0)
        for n in range(100)
    ]
    assert sum(shown) < 10
    assert waiting.add(WaitingMachine("f" * 16, "mine", code_of(bytes(32))), "10.0.0.8", 0.0)
    assert "mine" in [machine.name for machine in waiting.shown]
    for n in range(100):
        address = f"2001:db8::{n:x}"
        waiting.add(WaitingMachine(f"{n:015x}a", "gpu-box", code_of(bytes(32))), address, 0.0)
    assert waiting.add(WaitingMachine("e" * 16, "mine too", code_of(bytes(32))), "10.0.0.7", 0.0)
    assert waiting.add(WaitingMachine("d" * 16, "in IPv6", code_of(bytes(32))), "2001:db9::1", 0.0)


async def test_a_machine_cannot_use_all_admission_connections(
    lan: Lan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptor, "is_loopback", lambda address: False)
    member = await lan.start(0, door="closed")
    where = (member.me.addresses[0], member.port)
    context = Identity(key(7), Tokens.read("cd" * 32)).client_context(JOIN, anyone=True)
    held = [
        await asyncio.open_connection(*where, ssl=context, local_addr=("127.0.0.9", 0)) for _ in range(30)
    ]
    reach = Dialer(Identity(key(6), Tokens.read("cd" * 32)), lambda node: [])
    greeting, _ = await greet(reach, 1, (where,))
    assert greeting.node == member.me.node
    for _, writer in held:
        writer.transport.abort()


async def _response_to(context: ssl.SSLContext, where: tuple[str, int]) -> bytes:
    """The first bytes of the response to an HTTP request; empty if refused."""
    try:
        async with asyncio.timeout(3):
            reader, writer = await asyncio.open_connection(*where, ssl=context)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            return await reader.read(100)
    except (OSError, ssl.SSLError):
        return b""


async def test_a_signature_for_another_member_admits_nobody(lan: Lan) -> None:
    """A signature relayed by a man in the middle is invalid, since it covers his own key."""
    member = await lan.start(0)
    where = (member.me.addresses[0], member.port)
    man_in_the_middle, newcomer = Identity(key(6), Tokens.read("cd" * 32)), key(7)
    reach = Dialer(man_in_the_middle, lambda node: [])
    connection, _, _ = await reach.connect("", JOIN, FrameClient, timeout=3, addresses=(where,))
    greeting = msgspec.msgpack.decode(
        await connection.exchange(msgspec.msgpack.encode(Hello(1))), type=Greeting
    )
    signed = newcomer.sign(request_content(man_in_the_middle.key.public, greeting.number, "x"))
    with pytest.raises(PeerError, match="closed during the exchange"):
        await connection.exchange(msgspec.msgpack.encode(Request(newcomer.public, "x", signed)))
    assert lan.ring(0).admitted == ()


async def test_a_stranger_receives_answers_of_limited_size() -> None:
    """Anybody can announce a cluster, and each of its members would be contacted every two seconds."""
    names = tuple(KeyringMember(f"{number:016x}", "\U0001f600" * 64) for number in range(MAX_MEMBERS))
    longest = Answer(AdmissionState.ADMITTED, "ab" * 32, "0" * 16, 1e12, 2**40, names, names)
    for size, accepted in ((len(msgspec.msgpack.encode(longest)), True), (1 << 20, False)):
        client = applicant()
        client.connection_made(Mock())
        exchanging = asyncio.create_task(client.exchange(b"hello"))
        await asyncio.sleep(0)
        client.data_received(frame(bytes(size)) if accepted else frame(bytes(size))[:100])
        if accepted:
            assert len(await exchanging) == size
        else:
            with pytest.raises(PeerError, match="the limit is"):
                async with asyncio.timeout(1):
                    await exchanging


@pytest.mark.parametrize("junk", [b"\x00" * 2000, b"\xff" * 40, b"\x00\x00\x00\x00\x00\x00\x00\x05junk!"])
async def test_junk_on_the_admission_protocol_is_harmless(lan: Lan, junk: bytes) -> None:
    member = await lan.start(0)
    where = (member.me.addresses[0], member.port)
    context = Identity(key(7), Tokens.read("cd" * 32)).client_context(JOIN)
    for _ in range(40):
        connection = await asyncio.open_connection(*where, ssl=context)
        connection[1].write(junk)
        connection[1].close()
    second = await lan.start(1, 0)
    await until(lan.joined)
    assert second.me.admitted_by or member.me.admitted_by


async def test_a_refused_secret_order_names_the_leader() -> None:
    answers: dict[str, Any] = {}
    server = Mock(method=lambda name, request, handler: answers.update({name: handler}))
    AdmissionCalls(Mock(), "a", lambda: "b", lambda node: f"pc-{node}").register(server)
    assert (await answers["secret"]("c", Mock())).refusal == "pc-b leads here, not pc-c"
