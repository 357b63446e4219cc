"""Sealed datagrams: only members read and make them, and none counts twice."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sollold.cluster.net.packet_seal import OVERHEAD, SENDERS, WINDOW, DropReason, OpenedPacket, Sealer

TOKEN = bytes(32)
OTHER = bytes([7]) * 32
A = "00000000000000aa"
B = "00000000000000bb"


def sealer(node: str = A, *, tokens: tuple[bytes, ...] = (TOKEN,), boot: int = 1) -> Sealer:
    return Sealer(tokens, node=node, boot=boot)


@given(st.binary(max_size=1400))
def test_what_is_sealed_is_opened(data: bytes) -> None:
    packet = sealer().seal(data)
    assert len(packet) == len(data) + OVERHEAD
    assert sealer(B).open(packet) == OpenedPacket(A, 1, data, TOKEN)


def test_nothing_is_readable() -> None:
    assert b"secret words" not in sealer().seal(b"secret words")


def test_a_packet_counts_once() -> None:
    one, other = sealer(), sealer(B)
    packet = one.seal(b"x")
    assert other.open(packet) is not None
    assert other.open(packet) is None
    assert other.refused[DropReason.REPLAYED] == 1


@given(st.permutations(range(20)))
def test_each_packet_of_any_order_counts_once(order: list[int]) -> None:
    one, other = sealer(), sealer(B)
    packets = [one.seal(bytes([at])) for at in range(20)]
    for at in order:
        opened = other.open(packets[at])
        assert opened is not None
        assert opened.data == bytes([at])
    assert all(other.open(packet) is None for packet in packets)


def test_too_late_is_refused() -> None:
    one, other = sealer(), sealer(B)
    first = one.seal(b"first")
    second = one.seal(b"second")
    for _ in range(WINDOW - 1):
        last = one.seal(b"")
    assert other.open(last) is not None
    assert other.open(second) is not None
    assert other.open(first) is None
    assert other.refused[DropReason.REPLAYED] == 1


def test_a_new_boot_starts_anew() -> None:
    other = sealer(B)
    for boot in (1, 2):
        assert other.open(sealer(boot=boot).seal(b"x")) == OpenedPacket(A, boot, b"x", TOKEN)


def test_another_token_is_foreign() -> None:
    other = sealer(B, tokens=(OTHER,))
    assert other.open(sealer().seal(b"x")) is None
    assert other.refused[DropReason.FOREIGN] == 1


def test_tokens_overlap_while_they_change() -> None:
    old, new = sealer(tokens=(TOKEN,)), sealer(B, tokens=(OTHER, TOKEN))
    assert new.open(old.seal(b"x")) == OpenedPacket(A, 1, b"x", TOKEN)
    newest = sealer("00000000000000cc", tokens=(OTHER,))
    assert newest.open(new.seal(b"y")) == OpenedPacket(B, 1, b"y", OTHER)
    assert old.open(new.seal(b"y")) is None


def test_a_packet_counts_once_though_the_token_changes() -> None:
    one, other = sealer(), sealer(B)
    packet = one.seal(b"x")
    assert other.open(packet) is not None
    other.change_tokens((OTHER, TOKEN))
    assert other.open(packet) is None
    one.change_tokens((OTHER,))
    assert other.open(one.seal(b"y")) == OpenedPacket(A, 1, b"y", OTHER)
    assert other.open(packet) is None


def test_an_evicted_node_is_not_heard() -> None:
    other = sealer(B)
    other.evict([A])
    assert other.open(sealer().seal(b"x")) is None
    assert other.refused[DropReason.EVICTED] == 1
    other.evict([])
    assert other.open(sealer().seal(b"x")) is not None


@given(st.integers(0, OVERHEAD + 9), st.integers(1, 255))
def test_any_damage_is_refused(at: int, flip: int) -> None:
    packet = bytearray(sealer().seal(b"ten bytes."))
    packet[at] ^= flip
    other = sealer(B)
    assert other.open(bytes(packet)) is None
    assert sum(other.refused.values()) == 1
    # A forged counter must not shut the true sender out.
    assert other.open(sealer().seal(b"true")) is not None


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data: bytes) -> None:
    other = sealer(B)
    assert other.open(data) is None
    assert sum(other.refused.values()) == 1


def test_a_node_can_not_speak_for_another() -> None:
    packet = bytearray(sealer().seal(b"x"))
    packet[1:9] = bytes.fromhex(B)
    assert sealer("00000000000000cc").open(bytes(packet)) is None


def test_windows_are_bounded() -> None:
    other = sealer(B)
    for boot in range(SENDERS + 10):
        other.open(sealer(boot=boot).seal(b""))
    assert len(other._senders) == SENDERS
