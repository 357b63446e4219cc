"""Statements that a node signs with its own key: that it is alive, that it left, and its record.

Others pass these statements on, and every receiver checks them against the author's key. So neither a
lying member nor a faulty one can speak for another, however a statement travelled.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import Protocol

from sollold.cluster.gossip.actions import Address
from sollold.cluster.gossip.packet import encode


class Signer(Protocol):
    """This node's key, and verification of other nodes' signatures."""

    @property
    def public(self) -> bytes:
        """This node's public key."""
        ...

    def sign(self, content: bytes) -> bytes:
        """Return the signature of ``content`` by this node's key."""
        ...

    def verify(self, node: str, public: bytes, signature: bytes, content: bytes) -> bool:
        """Whether ``public`` is the key of ``node``, and ``signature`` was made with it over ``content``."""
        ...


def alive_content(node: str, boot: int, incarnation: int, addresses: tuple[Address, ...]) -> bytes:
    """Return the signed content of an `Alive`."""
    return b"sollold alive 1" + encode((node, boot, incarnation, addresses))


def left_content(node: str, incarnation: int) -> bytes:
    """Return the signed content of a `Left`."""
    return b"sollold left 1" + encode((node, incarnation))


def record_content(node: str, boot: int, version: int, fields: Mapping[str, bytes]) -> bytes:
    """Return the signed content of a record: all encoded fields, including those of later releases."""
    digest = blake2b(digest_size=32)
    for name in sorted(fields):
        digest.update(encode((name, fields[name])))
    return b"sollold record 1" + encode((node, boot, version, digest.digest()))
