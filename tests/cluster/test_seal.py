"""Sealed datagrams: only members can read and make them, and replays are dropped."""

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
def test_sealing_and_opening_round_trip(data: bytes) -> None:
    packet = sealer().seal(data)
    assert len(packet) == len(data) + OVERHEAD
    assert sealer(B).open(packet) == OpenedPacket(A, 1, data, TOKEN)


def test_sealed_data_is_unreadable() -> None:
    assert b"secret words" not in sealer().seal(b"secret words")


def test_a_repeated_packet_is_dropped() -> None:
    sender, receiver = sealer(), sealer(B)
    packet = sender.seal(b"x")
    assert receiver.open(packet) is not None
    assert receiver.open(packet) is None
    assert receiver.refused[DropReason.REPLAYED] == 1


@given(st.permutations(range(20)))
def test_reordered_packets_are_accepted_once(order: list[int]) -> None:
    sender, receiver = sealer(), sealer(B)
    packets = [sender.seal(bytes([index])) for index in range(20)]
    for index in order:
        opened = receiver.open(packets[index])
        assert opened is not None
        assert opened.data == bytes([index])
    assert all(receiver.open(packet) is None for packet in packets)


def test_packets_behind_the_window_are_refused() -> None:
    sender, receiver = sealer(), sealer(B)
    first = sender.seal(b"first")
    second = sender.seal(b"second")
    for _ in range(WINDOW - 1):
        last = sender.seal(b"")
    assert receiver.open(last) is not None
    assert receiver.open(second) is not None
    assert receiver.open(first) is None
    assert receiver.refused[DropReason.REPLAYED] == 1


def test_a_new_boot_has_its_own_window() -> None:
    receiver = sealer(B)
    for boot in (1, 2):
        assert receiver.open(sealer(boot=boot).seal(b"x")) == OpenedPacket(A, boot, b"x", TOKEN)


def test_packets_of_another_token_are_foreign() -> None:
    receiver = sealer(B, tokens=(OTHER,))
    assert receiver.open(sealer().seal(b"x")) is None
    assert receiver.refused[DropReason.FOREIGN] == 1


def test_old_and_new_tokens_are_accepted_during_a_change() -> None:
    old, new = sealer(tokens=(TOKEN,)), sealer(B, tokens=(OTHER, TOKEN))
    assert new.open(old.seal(b"x")) == OpenedPacket(A, 1, b"x", TOKEN)
    newest = sealer("00000000000000cc", tokens=(OTHER,))
    assert newest.open(new.seal(b"y")) == OpenedPacket(B, 1, b"y", OTHER)
    assert old.open(new.seal(b"y")) is None


def test_a_repeated_packet_is_dropped_after_a_token_change() -> None:
    sender, receiver = sealer(), sealer(B)
    packet = sender.seal(b"x")
    assert receiver.open(packet) is not None
    receiver.change_tokens((OTHER, TOKEN))
    assert receiver.open(packet) is None
    sender.change_tokens((OTHER,))
    assert receiver.open(sender.seal(b"y")) == OpenedPacket(A, 1, b"y", OTHER)
    assert receiver.open(packet) is None


def test_packets_of_an_evicted_node_are_refused() -> None:
    receiver = sealer(B)
    receiver.evict([A])
    assert receiver.open(sealer().seal(b"x")) is None
    assert receiver.refused[DropReason.EVICTED] == 1
    receiver.evict([])
    assert receiver.open(sealer().seal(b"x")) is not None


@given(st.integers(0, OVERHEAD + 9), st.integers(1, 255))
def test_damaged_packets_are_refused(position: int, flip: int) -> None:
    packet = bytearray(sealer().seal(b"ten bytes."))
    packet[position] ^= flip
    receiver = sealer(B)
    assert receiver.open(bytes(packet)) is None
    assert sum(receiver.refused.values()) == 1
    # A forged counter must not lock the real sender out.
    assert receiver.open(sealer().seal(b"true")) is not None


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    receiver = sealer(B)
    assert receiver.open(data) is None
    assert sum(receiver.refused.values()) == 1


def test_a_packet_with_a_changed_sender_is_refused() -> None:
    packet = bytearray(sealer().seal(b"x"))
    packet[1:9] = bytes.fromhex(B)
    assert sealer("00000000000000cc").open(bytes(packet)) is None


def test_the_number_of_windows_is_limited() -> None:
    receiver = sealer(B)
    for boot in range(SENDERS + 10):
        receiver.open(sealer(boot=boot).seal(b""))
    assert len(receiver._senders) == SENDERS
