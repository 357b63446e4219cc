"""The handshake with an RPC worker, and answers of other programs."""

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


def test_the_memory_of_all_devices_is_requested_in_order() -> None:
    handshake = Handshake(Version(7, 0, 0))
    assert handshake.begin() == bytes([14]) + struct.pack("<Q", 24) + bytes(24)
    assert handshake.feed(HELLO) == bytes([15]) + struct.pack("<Q", 0)
    assert handshake.feed(TWO_DEVICES) == bytes([11]) + struct.pack("<QI", 4, 0)
    assert handshake.feed(MEMORY) == bytes([11]) + struct.pack("<QI", 4, 1)
    assert not handshake.done
    assert handshake.feed(reply(struct.pack("<QQ", 99, 20))) == b""
    assert handshake.done and str(handshake.version) == "7.0.1"
    assert handshake.memories == [DeviceMemory(5, 10), DeviceMemory(20, 20)], (
        "free memory is limited to the total"
    )


def test_answers_may_arrive_in_any_chunks() -> None:
    handshake, sent = Handshake(), b""
    for byte in HELLO + TWO_DEVICES + MEMORY + MEMORY:
        sent += handshake.feed(bytes([byte]))
    assert handshake.done and len(handshake.memories) == 2
    assert sent.count(struct.pack("<QI", 4, 1)) == 1


def test_the_handshake_ends_after_another_version() -> None:
    handshake = Handshake(Version(6, 0, 0))
    assert handshake.feed(HELLO) == b""
    assert handshake.done and handshake.version == Version(7, 0, 1) and handshake.memories == []


def test_patch_versions_are_compatible() -> None:
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
def test_answers_of_other_programs_are_recognized(answers: bytes) -> None:
    with pytest.raises(NotAWorker):
        Handshake().feed(answers)


@given(st.lists(st.binary(max_size=64), max_size=20))
def test_any_bytes_are_accepted_or_refused(pieces: list[bytes]) -> None:
    handshake = Handshake()
    try:
        for piece in pieces:
            handshake.feed(piece)
    except NotAWorker:
        pass
