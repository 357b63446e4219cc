"""Hash requests from a head to its worker are held back until released; all other bytes pass unchanged."""

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
def test_a_hash_request_is_held_in_chunks_of_any_size(size: int) -> None:
    frames, passed = HashFrames(), b""
    stream = HELLO + DATA + hash_of("blk.1.ffn_up.weight", 255) + DATA
    for start in range(0, len(stream), size):
        passed += frames.feed(stream[start : start + size])
    assert passed == HELLO + DATA
    assert frames.asked == HeldHash("blk.1.ffn_up.weight", 8, (64, 32, 1, 1), 0, "00000000000000ff")
    assert frames.held == len(stream) - len(passed)
    assert passed + frames.release() == stream
    assert frames.asked is None and not frames.over


def test_hash_requests_are_released_one_by_one() -> None:
    frames = HashFrames()
    first, second = hash_of("a", 1), hash_of("b", 2)
    assert frames.feed(first + second + DATA) == b""
    assert frames.release() == first
    assert frames.asked is not None and frames.asked.name == "b"
    assert frames.release() == second + DATA


def test_everything_passes_after_the_first_computation() -> None:
    frames = HashFrames()
    assert frames.feed(COMPUTE + hash_of("a", 1)) == COMPUTE + hash_of("a", 1)
    assert frames.over and frames.feed(hash_of("b", 2)) == hash_of("b", 2)


def test_a_hash_request_of_unknown_size_passes() -> None:
    frames = HashFrames()
    assert frames.feed(request(7, bytes(400))) == request(7, bytes(400))
    assert frames.asked is None


def test_all_held_bytes_can_be_released() -> None:
    frames = HashFrames()
    stream = hash_of("a", 1) + hash_of("b", 2)
    assert frames.feed(stream) == b""
    assert frames.release_all() == stream


@given(st.binary(max_size=4000))
def test_any_bytes_are_passed_or_released_unchanged(stream: bytes) -> None:
    frames = HashFrames()
    passed = frames.feed(stream)
    assert passed + frames.release_all() == stream
