"""The greeting of a worker, byte by byte, and whatever else may answer on its port."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sollold.engines.external.rpc_protocol import DeviceMemory, Handshake, NotAWorker, Version


def reply(payload: bytes) -> bytes:
    return struct.pack("<Q", len(payload)) + payload


HELLO = reply(bytes([7, 0, 1, 0]) + bytes(24))
TWO_DEVICES = reply(struct.pack("<I", 2))
MEMORY = reply(struct.pack("<QQ", 5, 10))


def test_all_devices_are_asked_for_their_memory_in_turn() -> None:
    talk = Handshake(Version(7, 0, 0))
    assert talk.begin() == bytes([14]) + struct.pack("<Q", 24) + bytes(24)
    assert talk.feed(HELLO) == bytes([15]) + struct.pack("<Q", 0)
    assert talk.feed(TWO_DEVICES) == bytes([11]) + struct.pack("<QI", 4, 0)
    assert talk.feed(MEMORY) == bytes([11]) + struct.pack("<QI", 4, 1)
    assert not talk.done
    assert talk.feed(reply(struct.pack("<QQ", 99, 20))) == b""
    assert talk.done and str(talk.version) == "7.0.1"
    assert talk.memories == [DeviceMemory(5, 10), DeviceMemory(20, 20)], "none has more free than it has"


def test_it_does_not_matter_in_what_pieces_answers_come() -> None:
    talk, sent = Handshake(), b""
    for byte in HELLO + TWO_DEVICES + MEMORY + MEMORY:
        sent += talk.feed(bytes([byte]))
    assert talk.done and len(talk.memories) == 2
    assert sent.count(struct.pack("<QI", 4, 1)) == 1


def test_with_another_version_nothing_more_is_said() -> None:
    talk = Handshake(Version(6, 0, 0))
    assert talk.feed(HELLO) == b""
    assert talk.done and talk.version == Version(7, 0, 1) and talk.memories == []


def test_a_patch_makes_no_other_version() -> None:
    assert Version(7, 0, 0).mixes(Version(7, 0, 3))
    assert not Version(7, 0, 0).mixes(Version(7, 1, 0))


@pytest.mark.parametrize(
    "answers",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        reply(b""),
        HELLO + reply(b"\x01"),
        HELLO + reply(struct.pack("<I", 70_000)),
        HELLO + TWO_DEVICES + reply(b"short"),
        HELLO + TWO_DEVICES + reply(struct.pack("<QQ", 1, 1 << 63)),
    ],
)
def test_what_is_no_worker_is_told_from_one(answers: bytes) -> None:
    with pytest.raises(NotAWorker):
        Handshake().feed(answers)


@given(st.lists(st.binary(max_size=64), max_size=20))
def test_no_bytes_break_it_in_another_way(pieces: list[bytes]) -> None:
    talk = Handshake()
    try:
        for piece in pieces:
            talk.feed(piece)
    except NotAWorker:
        pass
