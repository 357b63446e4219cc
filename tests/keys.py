"""Deterministic node keys, and cheap signers for tests that do not test signatures."""

from __future__ import annotations

import hashlib

from sollold.cluster.net.node_key import NodeKey


def key(number: int) -> NodeKey:
    """A different key for each number."""
    return NodeKey(hashlib.sha256(f"sollold test key {number}".encode()).digest())


def key_of(node: str) -> NodeKey:
    """Return the key of one of the first eight nodes by its node id."""
    return next(candidate for candidate in map(key, range(8)) if candidate.node == node)


class ToySigner:
    """A fast signer for simulations: a node's id is its key."""

    def __init__(self, node: str) -> None:
        self.public = bytes.fromhex(node)

    def sign(self, content: bytes) -> bytes:
        return hashlib.blake2b(content, key=self.public, digest_size=32).digest()

    def verify(self, node: str, public: bytes, signature: bytes, content: bytes) -> bool:
        expected = hashlib.blake2b(content, key=public, digest_size=32).digest()
        return public.hex() == node and signature == expected


class Unsigned:
    """Makes empty signatures and accepts any, so that tests can choose node ids."""

    public = b""

    def sign(self, content: bytes) -> bytes:
        return b""

    def verify(self, node: str, public: bytes, signature: bytes, content: bytes) -> bool:
        return True
