"""Records: one writer each, the greatest version wins, whatever order and loss."""

from __future__ import annotations

import zlib
from collections.abc import Collection
from dataclasses import replace
from random import Random

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


def change(one: Registry, **changes: object) -> None:
    assert one.update(replace(one.me, **changes))  # type: ignore[arg-type]


def big(count: int, seed: int = 1) -> tuple[Endpoint, ...]:
    random = Random(seed)
    return tuple(
        Endpoint(
            f"{random.getrandbits(128):x}", "m", f"{random.getrandbits(256):x}", Backend.LOCAL, State.READY
        )
        for _ in range(count)
    )


def test_a_record_spreads() -> None:
    one, other = registry(A), registry(B)
    change(one, models="new", grants=(Grant("d", "CUDA0", 5, A, GrantState.COMMITTED),))
    assert other.merge_delta(delta(one)) is Merge.NEWER
    held = other.get(A)
    assert held is not None
    assert held.record == one.me
    assert other.merge_delta(delta(one)) is Merge.OLD


def test_equal_values_are_no_change() -> None:
    one = registry()
    version = one.me.version
    assert not one.update(replace(one.me, version=99))
    assert one.me.version == version


def test_the_version_rises_above_the_last_run() -> None:
    assert registry(version=70).me.version == 71


def test_versions_are_written_ahead() -> None:
    one = registry(version=70)
    assert one.ceiling == 71 + AHEAD
    for at in range(AHEAD + 1):
        change(one, models=str(at))
        assert one.me.version < one.ceiling


def test_a_small_delta_suits_who_is_nearly_up_to_date() -> None:
    one, other = registry(A), registry(B)
    change(one, endpoints=big(20))
    assert other.merge_whole(_whole(one)) is Merge.NEWER
    change(one, models="x")
    small = delta(one)
    assert small.base > 0
    assert len(small.fields) < 100
    assert other.merge_delta(small) is Merge.NEWER
    held = other.get(A)
    assert held is not None
    assert held.record == one.me


def test_who_lacks_the_base_is_behind_and_changes_nothing() -> None:
    one, other = registry(A), registry(B)
    change(one, endpoints=big(20))
    change(one, models="x")
    assert other.merge_delta(delta(one)) is Merge.BEHIND
    assert other.get(A) is None


def test_what_fits_no_datagram_is_announced() -> None:
    one, other = registry(A), registry(B)
    change(one, endpoints=big(40))
    message = one.delta(ROOM, ROOM)
    assert len(message) <= ROOM
    assert msgspec.msgpack.decode(message, type=Delta).fields == b""
    assert other.merge_delta(delta(one)) is Merge.BEHIND
    assert other.merge_whole(_whole(one)) is Merge.NEWER


def test_a_lost_disk_is_found_out_and_risen_above() -> None:
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


def test_equal_versions_of_two_boots_agree_everywhere() -> None:
    first, second = registry(A, boot=1), registry(A, boot=2)
    change(first, models="first")
    change(second, models="second")
    peers = [registry(B), registry(B)]
    peers[0].merge_delta(delta(first))
    peers[0].merge_delta(delta(second))
    peers[1].merge_delta(delta(second))
    peers[1].merge_delta(delta(first))
    held = [peer.get(A) for peer in peers]
    assert all(one is not None and one.record.models == "second" for one in held)


def test_the_highest_claim_is_remembered() -> None:
    one, other = registry(A), registry(B)
    change(one, claim=Term(7, A))
    other.merge_delta(delta(one))
    change(one, claim=Term(0, ""))
    other.merge_delta(delta(one))
    assert other.highest == Term(7, A)


def test_broken_records_are_told() -> None:
    one, other = registry(A), registry(B)
    good = delta(one)
    bomb = msgspec.structs.replace(good, fields=_zip(bytes(RECORD_LIMIT + 1)))
    for bad in (
        bomb,
        msgspec.structs.replace(good, fields=b"no zlib"),
        msgspec.structs.replace(good, fields=good.fields + b"more"),
        msgspec.structs.replace(good, fields=_zip(encode({"name": 5}))),
        msgspec.structs.replace(good, fields=_zip(encode({"name": "without the rest"}))),
        msgspec.structs.replace(good, fields=_zip(encode([1]))),
    ):
        assert other.merge_delta(bad) is Merge.BROKEN
    whole = _whole(one)
    assert other.merge_whole(Whole(B[::-1], 1, 5, whole.record)) is Merge.BROKEN
    assert other.merge_whole(Whole(A, 1, 5, msgspec.Raw(encode({"node": A})))) is Merge.BROKEN
    assert other.get(A) is None


def test_fields_of_a_later_release_are_passed_over() -> None:
    one, other = registry(A), registry(B)
    parts = msgspec.to_builtins(one.me) | {"from_the_future": 1}
    news = Delta(A, 1, 0, 9, _zip(encode(parts)))
    assert other.merge_delta(news) is Merge.NEWER


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from(["models", "build", "setup", "endpoints", "grants"]), min_size=1, max_size=25),
    st.randoms(use_true_random=False),
)
def test_any_loss_and_order_ends_in_the_last_record(names: list[str], random: Random) -> None:
    """Peers get some of the deltas in any order; who is behind fetches. All end with what was written."""
    one = registry(A)
    sent = [delta(one, ROOM, 300)]
    for at, name in enumerate(names):
        value: object = f"v{at}"
        if name == "endpoints":
            value = big(random.randint(1, 12), at)
        elif name == "grants":
            value = (Grant("d", "CUDA0", at, A, GrantState.RESERVED),)
        change(one, **{name: value})
        sent.append(delta(one, ROOM, 300))
    peer = registry(B)
    seen = 0
    kept = [one for one in sent if random.random() < 0.7]
    random.shuffle(kept)
    for news in [*kept, sent[-1]]:
        merge = peer.merge_delta(news)
        if merge is Merge.BEHIND:
            assert peer.merge_whole(_whole(one)) is Merge.NEWER
        held = peer.get(A)
        assert held is None or held.version >= seen
        seen = held.version if held else 0
    held = peer.get(A)
    assert held is not None
    assert held.record == one.me


def _whole(one: Registry) -> Whole:
    whole = one.whole(one.me.node)
    assert whole is not None
    return msgspec.msgpack.decode(encode(whole), type=Whole)


def _zip(data: bytes) -> bytes:
    return zlib.compress(data)


def test_what_was_right_before_is_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Collection[str]] = []

    def noting(one: Record, highest: Term, known: Collection[str] = ()) -> str:
        checked.append(known)
        return objection(one, highest, known)

    monkeypatch.setattr(registry_module, "objection", noting)
    one, other = registry(A), registry(B)
    assert other.merge_delta(delta(one)) is Merge.NEWER
    change(one, links=((B, 0.001, 1e8),))
    assert other.merge_delta(delta(one)) is Merge.NEWER
    assert not checked[0]
    assert "links" not in checked[1]
    assert {"devices", "addresses"} <= set(checked[1])
    change(one, links=((B, float("nan"), 1e8),))
    assert other.merge_delta(delta(one)) is Merge.IMPOSSIBLE


def newer(one: Registry, **parts: object) -> Delta:
    """The own record of ``one`` as a later release would write it."""
    fields = {name: msgspec.Raw(part) for name, part in one._parts.items()}
    body = msgspec.msgpack.encode(fields | parts)
    return replace_fields(delta(one), zlib.compress(body))


def replace_fields(news: Delta, fields: bytes) -> Delta:
    return msgspec.structs.replace(news, base=0, fields=fields)


def as_map(endpoint: Endpoint, **more: object) -> dict[str, object]:
    return dict(msgspec.to_builtins(endpoint)) | more


READY = Endpoint("d", "m", "x", Backend.LOCAL, State.READY, forced=True, hung=True)


def test_a_later_release_may_say_more_and_an_earlier_one_less() -> None:
    one, other = registry(A), registry(B)
    change(one, build="b1", endpoints=(READY,))
    more = newer(one, colour="red", endpoints=[as_map(READY, mood={"good": 1})])
    assert other.merge_delta(more) is Merge.NEWER
    held = other.get(A)
    assert held is not None and held.record == one.me and not other.unread()
    assert b"colour" in bytes(held.whole().record), "it is passed on as it was signed"
    change(one, models="n")
    old = as_map(READY)
    del old["forced"], old["hung"]
    assert other.merge_delta(newer(one, endpoints=[old])) is Merge.NEWER
    held = other.get(A)
    assert held is not None and not held.record.endpoints[0].forced and not other.unread()


def test_values_that_only_a_later_release_knows_cost_the_node_its_placements_and_nothing_else() -> None:
    one, other = registry(A), registry(B)
    change(one, build="b1", endpoints=(READY,))
    strange = as_map(READY, id="e", state="paused")
    assert other.merge_delta(newer(one, endpoints=[as_map(READY), strange], tls={"v": 2})) is Merge.NEWER
    held = other.get(A)
    assert held is not None and held.record.endpoints == (READY,)
    assert (held.record.build, held.record.tls) == ("", False) and "upgrade" in held.record.setup
    assert set(other.unread()[A]) == {"endpoints", "tls"}
    change(one, models="n")
    assert other.merge_delta(newer(one)) is Merge.NEWER
    held = other.get(A)
    assert held is not None and held.record == one.me and not other.unread(), "it was upgraded"
    change(one, models="o")
    assert other.merge_delta(newer(one, name=["no", "text"])) is Merge.BROKEN
