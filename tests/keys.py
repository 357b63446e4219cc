"""Keys of nodes, the same in every run, and a signer for tests of what has nothing to do with signatures."""

from __future__ import annotations

import hashlib

from sollold.cluster.net.node_key import NodeKey


def key(number: int) -> NodeKey:
    """The key of a node; another one for each number."""
    return NodeKey(hashlib.sha256(f"sollold test key {number}".encode()).digest())


def key_of(node: str) -> NodeKey:
    """The key of one of the first nodes by its id."""
    return next(one for one in map(key, range(8)) if one.node == node)


class ToySigner:
    """Signs cheaply, for simulations: the key of a node is its id, and only its own process signs with it."""

    def __init__(self, node: str) -> None:
        self.public = bytes.fromhex(node)

    def sign(self, content: bytes) -> bytes:
        return hashlib.blake2b(content, key=self.public, digest_size=32).digest()

    def verify(self, node: str, public: bytes, signature: bytes, content: bytes) -> bool:
        made = hashlib.blake2b(content, key=public, digest_size=32).digest()
        return public.hex() == node and signature == made


class Unsigned:
    """Signs nothing and believes everything: node ids are free."""

    public = b""

    def sign(self, content: bytes) -> bytes:
        return b""

    def verify(self, node: str, public: bytes, signature: bytes, content: bytes) -> bool:
        return True
