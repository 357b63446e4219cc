"""What a head says to its worker passes untouched, but the hash of a tensor waits until it is released."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from sollold.engines.llamacpp.hash_frames import HashFrames, HeldHash


def request(command: int, payload: bytes = b"") -> bytes:
    return bytes([command]) + struct.pack("<Q", len(payload)) + payload


def hash_of(name: str, value: int, *, kind: int = 8, shape: tuple[int, ...] = (64, 32, 1, 1)) -> bytes:
    tensor = (
        struct.pack("<QIQ4I", 1, kind, 2, *shape)
        + bytes(228 - 36)
        + name.encode().ljust(64, b"\0")
        + bytes(4)
    )
    return request(7, tensor + struct.pack("<QQ", 0, value))


HELLO, DATA, COMPUTE = request(14, bytes(24)), request(6, bytes(5000)), request(10, b"graph")


@given(st.integers(1, 5400))
def test_a_hash_waits_in_whatever_pieces_it_comes(piece: int) -> None:
    frames, passed = HashFrames(), b""
    said = HELLO + DATA + hash_of("blk.1.ffn_up.weight", 255) + DATA
    for at in range(0, len(said), piece):
        passed += frames.feed(said[at : at + piece])
    assert passed == HELLO + DATA
    assert frames.asked == HeldHash("blk.1.ffn_up.weight", 8, (64, 32, 1, 1), 0, "00000000000000ff")
    assert frames.held == len(said) - len(passed)
    assert passed + frames.release() == said
    assert frames.asked is None and not frames.over


def test_one_after_the_other_waits() -> None:
    frames = HashFrames()
    first, second = hash_of("a", 1), hash_of("b", 2)
    assert frames.feed(first + second + DATA) == b""
    assert frames.release() == first
    assert frames.asked is not None and frames.asked.name == "b"
    assert frames.release() == second + DATA


def test_from_the_first_computation_on_everything_passes() -> None:
    frames = HashFrames()
    assert frames.feed(COMPUTE + hash_of("a", 1)) == COMPUTE + hash_of("a", 1)
    assert frames.over and frames.feed(hash_of("b", 2)) == hash_of("b", 2)


def test_a_hash_of_another_size_is_none_that_we_know() -> None:
    frames = HashFrames()
    assert frames.feed(request(7, bytes(400))) == request(7, bytes(400))
    assert frames.asked is None


def test_what_is_ended_passes_as_a_whole() -> None:
    frames = HashFrames()
    said = hash_of("a", 1) + hash_of("b", 2)
    assert frames.feed(said) == b""
    assert frames.release_all() == said


@given(st.binary(max_size=4000))
def test_any_bytes_pass_but_for_an_end_that_may_become_a_hash(said: bytes) -> None:
    frames = HashFrames()
    passed = frames.feed(said)
    assert passed + frames.release_all() == said
