"""Digests of byte ranges of a file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sollold.models.transfer.file_digest import digest_between, new_key, sha256_between

DATA = os.urandom((2 << 20) + 77)
"""Longer than the chunks in which a file is read."""


@pytest.fixture
def handle(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "file").write_bytes(DATA)
    opened = os.open(tmp_path / "file", os.O_RDONLY)
    yield opened
    os.close(opened)


@pytest.mark.parametrize(("start", "end"), [(0, len(DATA)), (5, 17), (1 << 20, (1 << 20) + 1), (7, 7)])
def test_digests_equal_those_of_the_libraries(handle: int, start: int, end: int) -> None:
    key = new_key()
    span = DATA[start:end]
    assert sha256_between(handle, start, end) == hashlib.sha256(span).hexdigest()
    assert digest_between(handle, start, end, "") == hashlib.sha256(span).hexdigest()
    assert (
        digest_between(handle, start, end, key)
        == AESGCM(bytes.fromhex(key)).encrypt(bytes(12), b"", span).hex()
    )


def test_keys_are_unique() -> None:
    assert len({new_key() for _ in range(100)}) == 100


@pytest.mark.parametrize("key", ["00", "zz" * 16, "00" * 32])
def test_invalid_keys_are_refused(handle: int, key: str) -> None:
    with pytest.raises(ValueError):
        digest_between(handle, 0, 10, key)


@pytest.mark.parametrize("key", ["", "00" * 16])
def test_reading_can_be_stopped(handle: int, key: str) -> None:
    with pytest.raises(InterruptedError):
        digest_between(handle, 0, len(DATA), key, lambda: True)
