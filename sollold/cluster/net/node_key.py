"""The private key that identifies a node: generated at its first start, kept in its state folder."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from functools import lru_cache
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from sollold.settings.state_file import close_to_others, keep_copy, read_bounded, write_whole

log = logging.getLogger("sollold.cluster")

KEY_FILE = "node-key"
_OLD_ID_FILE = "node-id"
"""File of earlier releases, which chose an id at random."""


class NodeKey:
    """An Ed25519 key (RFC 8032); a `sollold.cluster.gossip.signing.Signer`.

    Attributes:
        private: the key itself, for the node's certificate.
        public: its public key, 32 bytes.
        node: the node's id, see `id_of_key`.
    """

    def __init__(self, seed: bytes) -> None:
        """``seed``: 32 random bytes."""
        self.private = Ed25519PrivateKey.from_private_bytes(seed)
        self.public = self.private.public_key().public_bytes_raw()
        self.node = id_of_key(self.public)

    @classmethod
    def load(cls, state: Path) -> NodeKey:
        """Load the key from the folder ``state``; generate it there if it is missing or damaged.

        Blocks on disk I/O.

        Raises:
            OSError: the file can't be read or written.
        """
        path = state / KEY_FILE
        with contextlib.suppress(FileNotFoundError):
            close_to_others(path)
            data = read_bounded(path, 256)
            with contextlib.suppress(ValueError):
                return cls(bytes.fromhex(data.decode("ascii")))
            copy = keep_copy(path, data)
            log.error("%s is damaged: this node gets a new key and a new id; a copy is in %s", path, copy)
        key = cls(Ed25519PrivateKey.generate().private_bytes_raw())
        write_whole(path, key.private.private_bytes_raw().hex().encode() + b"\n")
        old = state / _OLD_ID_FILE
        with contextlib.suppress(FileNotFoundError):
            former = read_bounded(old, 64).decode("ascii", "replace").strip()
            old.unlink()
            log.info("node %s now has a key and the new id %s", former, key.node)
        return key

    def sign(self, content: bytes) -> bytes:
        """Return the signature of ``content``, 64 bytes."""
        return self.private.sign(content)

    def verify(self, node: str, public: bytes, signature: bytes, content: bytes) -> bool:
        """Whether ``public`` is the key of ``node``, and ``signature`` was made with it over ``content``."""
        if id_of_key(public) != node:
            return False
        key = _public_key(public)
        if key is None:
            return False
        try:
            key.verify(signature, content)
        except InvalidSignature:
            return False
        return True


def id_of_key(public: bytes) -> str:
    """Return the id of the node with this public key: the first 16 hex digits of a SHA-256 over it."""
    return hashlib.sha256(b"sollold node" + public).hexdigest()[:16]


@lru_cache(4096)
def _public_key(public: bytes) -> Ed25519PublicKey | None:
    try:
        return Ed25519PublicKey.from_public_bytes(public)
    except ValueError:
        return None
