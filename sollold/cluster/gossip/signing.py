"""What a node signs with its own key: that it lives, that it leaves, and its record.

Others pass these statements on, and whoever receives one checks it against the author's key. So neither a
member that lies nor one that is broken can speak for another, however the statement travelled.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import Protocol

from sollold.cluster.gossip.actions import Address
from sollold.cluster.gossip.packet import encode


class Signer(Protocol):
    """This node's key, and the check of signatures by others'."""

    @property
    def public(self) -> bytes:
        """This node's public key."""
        ...

    def sign(self, content: bytes) -> bytes:
        """The signature of ``content`` by this node's key."""
        ...

    def verify(self, node: str, public: bytes, signature: bytes, content: bytes) -> bool:
        """Whether ``public`` is the key of ``node``, and ``signature`` was made with it over ``content``."""
        ...


def alive_content(node: str, boot: int, incarnation: int, addresses: tuple[Address, ...]) -> bytes:
    """What is signed of an `Alive`."""
    return b"sollold alive 1" + encode((node, boot, incarnation, addresses))


def left_content(node: str, incarnation: int) -> bytes:
    """What is signed of a `Left`."""
    return b"sollold left 1" + encode((node, incarnation))


def record_content(node: str, boot: int, version: int, fields: Mapping[str, bytes]) -> bytes:
    """What is signed of a record: the encoded value of every field, those of later releases too."""
    digest = blake2b(digest_size=32)
    for name in sorted(fields):
        digest.update(encode((name, fields[name])))
    return b"sollold record 1" + encode((node, boot, version, digest.digest()))
