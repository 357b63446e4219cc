"""Packets: encoding and decoding round-trip, and arbitrary bytes are rejected without errors."""

from __future__ import annotations

from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sollold.cluster.gossip.actions import PersistedState
from sollold.cluster.gossip.gossip import Gossip
from sollold.cluster.gossip.packet import (
    FORMAT,
    LIMIT,
    PUSH_PULL_LIMIT,
    Ack,
    Alive,
    Dead,
    Delta,
    Left,
    Message,
    Nack,
    Packet,
    Ping,
    PingReq,
    PushPull,
    Rejected,
    Suspect,
    compound,
    decode,
    decode_push_pull,
    encode,
    head,
    room,
)
from sollold.cluster.gossip.record import Record
from sollold.cluster.net.packet_seal import OVERHEAD
from tests.keys import Unsigned

ME = "00000000000000aa"
PEER = "00000000000000bb"
SOURCE = ("10.0.0.2", 11436)

nodes = st.integers(0, 2**64 - 1).map(lambda number: f"{number:016x}")
counters = st.integers(0, 2**62 - 1)
boots = st.integers(0, 2**63 - 1)
sequences = st.integers(0, 2**32 - 1)
addresses = st.lists(st.tuples(st.ip_addresses().map(str), st.integers(1, 65535)), max_size=8).map(tuple)
messages: st.SearchStrategy[Message] = st.one_of(
    st.builds(Ping, sequences, st.one_of(nodes, st.just(""))),
    st.builds(PingReq, sequences, nodes, addresses),
    st.builds(Ack, sequences, counters),
    st.builds(Nack, sequences),
    st.builds(Alive, nodes, boots, counters, addresses),
    st.builds(Suspect, nodes, counters, nodes),
    st.builds(Dead, nodes, counters, nodes),
    st.builds(Left, nodes, counters),
    st.builds(Delta, nodes, boots, counters, counters, st.binary(max_size=300)),
)
# Arbitrary values in the shape of a packet, which pass most of the decoder.
values: st.SearchStrategy[object] = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(), st.binary(), nodes
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=6), st.dictionaries(st.text(max_size=4), inner)),
    max_leaves=20,
)
shaped = st.tuples(
    st.integers(0, 2), nodes, boots, st.lists(st.one_of(st.lists(values, max_size=6), values), max_size=4)
)


def core() -> Gossip:
    record = Record(ME, "me", 0, ("10.0.0.1",), 11435, 11436, "0.1.0")
    address = (("10.0.0.1", 11436),)
    return Gossip(
        record, boot=5, addresses=address, kept=PersistedState(), now=0.0, random=Random(1), signer=Unsigned()
    )


@given(nodes, boots, st.lists(messages, max_size=3))
def test_encoding_and_decoding_round_trip(sender: str, boot: int, sent: list[Message]) -> None:
    data = compound(head(sender, boot), [encode(message) for message in sent])
    if len(data) <= LIMIT:
        assert decode(data) == Packet(FORMAT, sender, boot, sent)


@given(st.binary(max_size=1500))
def test_any_bytes_are_a_packet_or_rejected(data: bytes) -> None:
    gossip = core()
    before = gossip.known.rejected
    try:
        decode(data)
        rejected = False
    except Rejected:
        rejected = True
    gossip.handle_packet(data, SOURCE, 1.0)
    assert gossip.known.rejected == before + rejected


@given(shaped)
def test_arbitrary_values_in_a_packet_raise_no_error(value: object) -> None:
    gossip = core()
    gossip.handle_packet(msgspec.msgpack.encode(value), SOURCE, 1.0)
    gossip.tick(2.0)


@given(st.lists(messages, max_size=4), nodes)
def test_arbitrary_messages_raise_no_error(sent: list[Message], sender: str) -> None:
    gossip = core()
    for second, message in enumerate(sent):
        gossip.handle_packet(compound(head(sender, 7), [encode(message)]), SOURCE, float(second))
    for second in range(5, 20):
        gossip.tick(float(second))


@given(st.lists(messages, min_size=1, max_size=3), st.data())
def test_a_damaged_packet_raises_no_error(sent: list[Message], data: st.DataObject) -> None:
    packet = bytearray(compound(head(PEER, 7), [encode(message) for message in sent]))
    position = data.draw(st.integers(0, len(packet) - 1))
    packet[position] = data.draw(st.integers(0, 255))
    core().handle_packet(bytes(packet), SOURCE, 1.0)
    core().handle_packet(bytes(packet[:position]), SOURCE, 1.0)


@given(st.one_of(st.binary(max_size=200), values.map(msgspec.msgpack.encode)))
def test_any_body_is_a_push_pull_or_rejected(data: bytes) -> None:
    gossip = core()
    answer, _ = gossip.push_pull(data, SOURCE, 1.0)
    if gossip.known.rejected:
        assert answer == b""


@pytest.mark.parametrize(
    "message",
    [
        [1, 1],  # a ping without a node
        [1, 1, ME, 0],  # one value too many
        [99, 1, ME],  # no such message
        [1, -1, ME],
        [1, 2**32, ME],
        [5, ME, 1, 1, [["10.0.0.1", 0]]],  # port 0
        [5, ME, 1, 1, [["10.0.0.1", 1]] * 9],  # too many addresses
        [5, "short", 1, 1, []],
        [6, ME, 2**62, ME],  # an incarnation that nobody could refute
        [9, ME, 1, 0, 1, "text"],
    ],
)
def test_an_invalid_message_rejects_the_packet(message: object) -> None:
    with pytest.raises(Rejected):
        decode(msgspec.msgpack.encode([1, PEER, 7, [message]]))


def test_another_format_is_rejected() -> None:
    with pytest.raises(Rejected):
        decode(msgspec.msgpack.encode([FORMAT + 1, PEER, 7, []]))


def test_bodies_above_the_limit_are_rejected() -> None:
    with pytest.raises(Rejected):
        decode(bytes(LIMIT + 1))
    with pytest.raises(Rejected):
        decode_push_pull(bytes(PUSH_PULL_LIMIT + 1))


def test_a_packet_fits_a_datagram() -> None:
    start = head(ME, 2**63 - 1)
    full = compound(start, [bytes(room(start))])
    assert len(full) == LIMIT
    assert len(full) + OVERHEAD <= 1400


def test_a_push_pull_is_read_as_written() -> None:
    body = PushPull(FORMAT, 0, ME, 5, [], [PEER], [])
    assert decode_push_pull(encode(body)) == body
