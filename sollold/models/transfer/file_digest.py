"""Digests of a file's bytes: sha256, as others publish it, and a faster one for comparison by two nodes.

The faster one is GMAC (NIST SP 800-38D) under a key drawn for one comparison, so that nobody could have
crafted other bytes with the same digest. With AES instructions it reaches 5 GB/s per core, where sha256
reaches 1.3 GB/s, and that only with SHA instructions.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable, Sequence

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

_PIECE = 1 << 20
_KEY_BYTES = 16
_NONCE = bytes(12)
"""Constant, since no key is used twice."""


def new_key() -> str:
    """Return a key for one comparison, in hex."""
    return secrets.token_hex(_KEY_BYTES)


def sha256_between(handle: int, start: int, end: int, stopped: Callable[[], bool] = lambda: False) -> str:
    """Return the hex sha256 of an open file's bytes from ``start`` up to, not including, ``end``. Blocks.

    Raises:
        OSError: they can't be read, or ``stopped`` returned true.
    """
    return digest_between(handle, start, end, "", stopped)


def digest_between(
    handle: int,
    start: int,
    end: int,
    key: str,
    stopped: Callable[[], bool] = lambda: False,
    take: Callable[[bytes], object] = lambda piece: None,
) -> str:
    """Return the hex GMAC of the same bytes under ``key`` (`new_key`); without a key, their sha256. Blocks.

    ``take`` receives the bytes in pieces, for further processing.

    Raises:
        OSError: as `sha256_between`.
        ValueError: the key is invalid.
    """
    if not key:
        digest = hashlib.sha256()
        _feed((digest.update, take), handle, start, end, stopped)
        return digest.hexdigest()
    secret = bytes.fromhex(key)
    if len(secret) != _KEY_BYTES:
        raise ValueError(f"a key has {_KEY_BYTES} bytes")
    mac = Cipher(algorithms.AES(secret), modes.GCM(_NONCE)).encryptor()
    _feed((mac.authenticate_additional_data, take), handle, start, end, stopped)
    mac.finalize()
    return mac.tag.hex()


def _feed(
    consumers: Sequence[Callable[[bytes], object]],
    handle: int,
    start: int,
    end: int,
    stopped: Callable[[], bool],
) -> None:
    """Feed the bytes to all consumers. Both digests release the GIL meanwhile."""
    while start < end and (piece := os.pread(handle, min(_PIECE, end - start), start)):
        if stopped():
            raise InterruptedError("stopped while it was read")
        for consume in consumers:
            consume(piece)
        start += len(piece)
