"""Records: only their own node writes them, and the greatest version wins despite loss and reordering."""

from __future__ import annotations

import zlib
from collections.abc import Collection
from dataclasses import replace
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sollold.cluster.gossip import registry as registry_module
from sollold.cluster.gossip.packet import RECORD_LIMIT, Delta, Whole, encode
from sollold.cluster.gossip.record import Backend, Endpoint, Grant, GrantState, Record, State
from sollold.cluster.gossip.record_check import objection
from sollold.cluster.gossip.registry import AHEAD, Merge, Registry
from sollold.cluster.gossip.term import Term
from tests.keys import Unsigned

A = "00000000000000aa"
B = "00000000000000bb"
ROOM = 1300


def record(node: str = A) -> Record:
    return Record(node, "name", 0, ("10.0.0.1",), 11435, 11436, "0.1.0")


def registry(node: str = A, *, boot: int = 1, version: int = 0) -> Registry:
    return Registry(record(node), boot, version, signer=Unsigned(), key_of=lambda node: b"")


def delta(source: Registry, room: int = ROOM, enough: int = ROOM) -> Delta:
    return msgspec.msgpack.decode(source.delta(room, enough), type=Delta)


def change(writer: Registry, **changes: Any) -> None:
    assert writer.update(replace(writer.me, **changes))


def big(count: int, seed: int = 1) -> tuple[Endpoint, ...]:
    random = Random(seed)
    return tuple(
        Endpoint(
            f"{random.getrandbits(128):x}", "m", f"{random.getrandbits(256):x}", Backend.LOCAL, State.READY
        )
        for _ in range(count)
    )


def test_a_record_spreads() -> None:
    writer, reader = registry(A), registry(B)
    change(writer, models="new", grants=(Grant("d", "CUDA0", 5, A, GrantState.COMMITTED),))
    assert reader.merge_delta(delta(writer)) is Merge.NEWER
    held = reader.get(A)
    assert held is not None
    assert held.record == writer.me
    assert reader.merge_delta(delta(writer)) is Merge.OLD


def test_an_update_with_equal_values_keeps_the_version() -> None:
    writer = registry()
    version = writer.me.version
    assert not writer.update(replace(writer.me, version=99))
    assert writer.me.version == version


def test_the_version_starts_above_that_of_the_last_run() -> None:
    assert registry(version=70).me.version == 71


def test_the_persisted_version_is_ahead_of_the_published_one() -> None:
    writer = registry(version=70)
    assert writer.ceiling == 71 + AHEAD
    for number in range(AHEAD + 1):
        change(writer, models=str(number))
        assert writer.me.version < writer.ceiling


def test_a_nearly_current_peer_needs_only_a_small_delta() -> None:
    writer, reader = registry(A), registry(B)
    change(writer, endpoints=big(20))
    assert reader.merge_whole(_whole(writer)) is Merge.NEWER
    change(writer, models="x")
    small = delta(writer)
    assert small.base > 0
    assert len(small.fields) < 100
    assert reader.merge_delta(small) is Merge.NEWER
    held = reader.get(A)
    assert held is not None
    assert held.record == writer.me


def test_a_delta_without_its_base_is_reported_as_behind() -> None:
    writer, reader = registry(A), registry(B)
    change(writer, endpoints=big(20))
    change(writer, models="x")
    assert reader.merge_delta(delta(writer)) is Merge.BEHIND
    assert reader.get(A) is None


def test_a_delta_that_exceeds_a_datagram_is_only_announced() -> None:
    writer, reader = registry(A), registry(B)
    change(writer, endpoints=big(40))
    message = writer.delta(ROOM, ROOM)
    assert len(message) <= ROOM
    assert msgspec.msgpack.decode(message, type=Delta).fields == b""
    assert reader.merge_delta(delta(writer)) is Merge.BEHIND
    assert reader.merge_whole(_whole(writer)) is Merge.NEWER


def test_a_node_that_lost_its_state_raises_its_version_above_the_old_record() -> None:
    before, peer = registry(A, boot=1, version=500), registry(B)
    change(before, models="old")
    peer.merge_delta(delta(before))
    after = registry(A, boot=2)
    assert peer.merge_delta(delta(after)) is Merge.OLD
    assert after.merge_delta(delta(before)) is Merge.RAISED
    assert after.me.version == before.me.version + 1
    assert peer.merge_delta(delta(after)) is Merge.NEWER
    held = peer.get(A)
    assert held is not None
    assert held.record.models == ""


def test_peers_agree_on_equal_versions_of_two_boots() -> None:
    first, second = registry(A, boot=1), registry(A, boot=2)
    change(first, models="first")
    change(second, models="second")
    peers = [registry(B), registry(B)]
    peers[0].merge_delta(delta(first))
    peers[0].merge_delta(delta(second))
    peers[1].merge_delta(delta(second))
    peers[1].merge_delta(delta(first))
    held = [peer.get(A) for peer in peers]
    assert all(held_record is not None and held_record.record.models == "second" for held_record in held)


def test_the_highest_claim_is_remembered() -> None:
    writer, reader = registry(A), registry(B)
    change(writer, claim=Term(7, A))
    reader.merge_delta(delta(writer))
    change(writer, claim=Term(0, ""))
    reader.merge_delta(delta(writer))
    assert reader.highest == Term(7, A)


def test_malformed_records_are_reported_as_broken() -> None:
    writer, reader = registry(A), registry(B)
    good = delta(writer)
    bomb = msgspec.structs.replace(good, fields=_zip(bytes(RECORD_LIMIT + 1)))
    for bad in (
        bomb,
        msgspec.structs.replace(good, fields=b"no zlib"),
        msgspec.structs.replace(good, fields=good.fields + b"more"),
        msgspec.structs.replace(good, fields=_zip(encode({"name": 5}))),
        msgspec.structs.replace(good, fields=_zip(encode({"name": "without the rest"}))),
        msgspec.structs.replace(good, fields=_zip(encode([1]))),
    ):
        assert reader.merge_delta(bad) is Merge.BROKEN
    whole = _whole(writer)
    assert reader.merge_whole(Whole(B[::-1], 1, 5, whole.record)) is Merge.BROKEN
    assert reader.merge_whole(Whole(A, 1, 5, msgspec.Raw(encode({"node": A})))) is Merge.BROKEN
    assert reader.get(A) is None


def test_unknown_fields_are_ignored() -> None:
    writer, reader = registry(A), registry(B)
    parts = msgspec.to_builtins(writer.me) | {"from_the_future": 1}
    news = Delta(A, 1, 0, 9, _zip(encode(parts)))
    assert reader.merge_delta(news) is Merge.NEWER


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from(["models", "build", "setup", "endpoints", "grants"]), min_size=1, max_size=25),
    st.randoms(use_true_random=False),
)
def test_any_loss_and_order_leads_to_the_last_record(names: list[str], random: Random) -> None:
    """A peer that gets some of the deltas in any order, and fetches the record where it is behind."""
    writer = registry(A)
    sent = [delta(writer, ROOM, 300)]
    for step, name in enumerate(names):
        value: object = f"v{step}"
        if name == "endpoints":
            value = big(random.randint(1, 12), step)
        elif name == "grants":
            value = (Grant("d", "CUDA0", step, A, GrantState.RESERVED),)
        change(writer, **{name: value})
        sent.append(delta(writer, ROOM, 300))
    peer = registry(B)
    seen = 0
    kept = [news for news in sent if random.random() < 0.7]
    random.shuffle(kept)
    for news in [*kept, sent[-1]]:
        merge = peer.merge_delta(news)
        if merge is Merge.BEHIND:
            assert peer.merge_whole(_whole(writer)) is Merge.NEWER
        held = peer.get(A)
        assert held is None or held.version >= seen
        seen = held.version if held else 0
    held = peer.get(A)
    assert held is not None
    assert held.record == writer.me


def _whole(writer: Registry) -> Whole:
    whole = writer.whole(writer.me.node)
    assert whole is not None
    return msgspec.msgpack.decode(encode(whole), type=Whole)


def _zip(data: bytes) -> bytes:
    return zlib.compress(data)


def test_unchanged_fields_are_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Collection[str]] = []

    def recording_objection(record: Record, highest: Term, known: Collection[str] = ()) -> str:
        checked.append(known)
        return objection(record, highest, known)

    monkeypatch.setattr(registry_module, "objection", recording_objection)
    writer, reader = registry(A), registry(B)
    assert reader.merge_delta(delta(writer)) is Merge.NEWER
    change(writer, links=((B, 0.001, 1e8),))
    assert reader.merge_delta(delta(writer)) is Merge.NEWER
    assert not checked[0]
    assert "links" not in checked[1]
    assert {"devices", "addresses"} <= set(checked[1])
    change(writer, links=((B, float("nan"), 1e8),))
    assert reader.merge_delta(delta(writer)) is Merge.IMPOSSIBLE


def newer(writer: Registry, **parts: object) -> Delta:
    """A delta with the own record of ``writer`` and ``parts`` added, as a later release would write it."""
    fields = {name: msgspec.Raw(part) for name, part in writer._parts.items()}
    body = msgspec.msgpack.encode(fields | parts)
    return replace_fields(delta(writer), zlib.compress(body))


def replace_fields(news: Delta, fields: bytes) -> Delta:
    return msgspec.structs.replace(news, base=0, fields=fields)


def as_map(endpoint: Endpoint, **more: object) -> dict[str, object]:
    return dict(msgspec.to_builtins(endpoint)) | more


READY = Endpoint("d", "m", "x", Backend.LOCAL, State.READY, forced=True, hung=True)


def test_records_with_additional_or_missing_fields_are_accepted() -> None:
    writer, reader = registry(A), registry(B)
    change(writer, build="b1", endpoints=(READY,))
    more = newer(writer, colour="red", endpoints=[as_map(READY, mood={"good": 1})])
    assert reader.merge_delta(more) is Merge.NEWER
    held = reader.get(A)
    assert held is not None and held.record == writer.me and not reader.unread()
    assert b"colour" in bytes(held.whole().record), "unknown fields stay in the signed record"
    change(writer, models="n")
    old = as_map(READY)
    del old["forced"], old["hung"]
    assert reader.merge_delta(newer(writer, endpoints=[old])) is Merge.NEWER
    held = reader.get(A)
    assert held is not None and not held.record.endpoints[0].forced and not reader.unread()


def test_unknown_values_only_exclude_the_node_from_placements() -> None:
    writer, reader = registry(A), registry(B)
    change(writer, build="b1", endpoints=(READY,))
    unknown = as_map(READY, id="e", state="paused")
    assert reader.merge_delta(newer(writer, endpoints=[as_map(READY), unknown], tls={"v": 2})) is Merge.NEWER
    held = reader.get(A)
    assert held is not None and held.record.endpoints == (READY,)
    assert (held.record.build, held.record.tls) == ("", False) and "upgrade" in held.record.setup
    assert set(reader.unread()[A]) == {"endpoints", "tls"}
    change(writer, models="n")
    assert reader.merge_delta(newer(writer)) is Merge.NEWER
    held = reader.get(A)
    assert held is not None and held.record == writer.me and not reader.unread(), (
        "readable after its next record"
    )
    change(writer, models="o")
    assert reader.merge_delta(newer(writer, name=["no", "text"])) is Merge.BROKEN
