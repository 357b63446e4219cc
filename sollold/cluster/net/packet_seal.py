"""Seals gossip datagrams: only holders of the cluster's token can read or make them; replays are refused.

A packet is a version byte, the sender's node id (8 bytes), its boot number (8), a counter (8), then the
ciphertext with its 16-byte tag. The key is derived by HKDF-SHA256 from the token for that sender and boot,
so a counter is a nonce that never repeats. Everything before the ciphertext is authenticated with it
(ChaCha20-Poly1305, RFC 8439). A window over each sender's counters refuses replays (RFC 6479's idea).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from enum import StrEnum

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from sollold.bounded import BoundedDict
from sollold.facts import dataclass

_VERSION = 1
_HEADER = struct.Struct(">B8sQQ")
_TAG = 16
OVERHEAD = _HEADER.size + _TAG
"""Bytes added by sealing."""
WINDOW = 1024
"""A packet this much older than its sender's newest is refused, as is any received before."""
SENDERS = 4096
"""Maximum senders whose windows are kept; the one silent for longest is dropped first."""


class DropReason(StrEnum):
    """Why a datagram was dropped."""

    MALFORMED = "malformed"
    """It is too short, or has another version."""
    FOREIGN = "foreign"
    """It was made with another token, or is corrupt."""
    REPLAYED = "replayed"
    """It was received before, or is too old to tell."""
    EVICTED = "evicted"
    """It was sent by a node that an admin evicted."""


@dataclass(frozen=True, slots=True)
class OpenedPacket:
    """Content of a datagram, with its sender and token."""

    node: str
    boot: int
    data: bytes
    token: bytes


class _Sender:
    """One sender's key and replay window."""

    __slots__ = ("cipher", "highest", "seen", "token")

    def __init__(self, token: bytes, cipher: ChaCha20Poly1305) -> None:
        self.token = token
        self.cipher = cipher
        self.highest = -1
        self.seen = 0
        """Bit i: counter ``highest - i`` was received."""

    def fresh(self, counter: int) -> bool:
        """Whether this counter is acceptable: neither received nor too old."""
        behind = self.highest - counter
        return behind < 0 or (behind < WINDOW and not self.seen >> behind & 1)

    def mark(self, counter: int) -> None:
        ahead = counter - self.highest
        if ahead > 0:
            self.seen = 1 if ahead >= WINDOW else (self.seen << ahead | 1) & (1 << WINDOW) - 1
            self.highest = counter
        else:
            self.seen |= 1 << -ahead


class Sealer:
    """Encrypts this node's datagrams and decrypts those of others.

    Args:
        tokens: first the one packets are made with; then others that are still (or already) accepted while
            the token is being changed.
        node: 16 hex digits.
        boot: new with every start of the process: the counter starts at 0.

    Raises:
        ValueError: no token, or a node id that is not 16 hex digits.
    """

    def __init__(self, tokens: tuple[bytes, ...], *, node: str, boot: int) -> None:
        if not tokens:
            raise ValueError("a cluster needs a token")
        self._tokens = tokens
        self._node = bytes.fromhex(node)
        if len(self._node) != 8:
            raise ValueError(f"a node id is 16 hex digits, not {node!r}")
        self._boot = boot
        self._counter = 0
        self._cipher = _cipher(tokens[0], self._node, boot)
        self._senders: BoundedDict[tuple[bytes, int], _Sender] = BoundedDict(SENDERS)
        self._evicted: frozenset[bytes] = frozenset()
        self.refused: dict[DropReason, int] = dict.fromkeys(DropReason, 0)

    def change_tokens(self, tokens: tuple[bytes, ...]) -> None:
        """Change the tokens, the first of which is used for sending. Replays stay refused."""
        self._tokens = tokens
        self._cipher = _cipher(tokens[0], self._node, self._boot)
        for key in [key for key, sender in self._senders.items() if sender.token not in tokens]:
            del self._senders[key]

    def evict(self, nodes: Iterable[str]) -> None:
        """Drop datagrams of these nodes, and of no others, from now on."""
        self._evicted = frozenset(map(bytes.fromhex, nodes))

    def seal(self, data: bytes) -> bytes:
        """Return a datagram with ``data``, `OVERHEAD` bytes longer."""
        header = _HEADER.pack(_VERSION, self._node, self._boot, self._counter)
        nonce = header[13:]
        self._counter += 1
        return header + self._cipher.encrypt(nonce, data, header)

    def open(self, packet: bytes) -> OpenedPacket | None:
        """Decrypt a datagram. Returns None if it is to be dropped, which is counted in ``refused``."""
        if len(packet) < OVERHEAD or packet[0] != _VERSION:
            self.refused[DropReason.MALFORMED] += 1
            return None
        header = packet[: _HEADER.size]
        _, node, boot, counter = _HEADER.unpack(header)
        if node in self._evicted:
            self.refused[DropReason.EVICTED] += 1
            return None
        known = self._senders.get((node, boot))
        if known is not None and not known.fresh(counter):
            self.refused[DropReason.REPLAYED] += 1
            return None
        sealed = packet[_HEADER.size :]
        for token in self._tokens:
            same = known is not None and known.token == token
            cipher = known.cipher if known is not None and same else _cipher(token, node, boot)
            try:
                data = cipher.decrypt(header[13:], sealed, header)
            except InvalidTag:
                continue
            if known is None:
                known = _Sender(token, cipher)
            else:
                known.token, known.cipher = token, cipher
            self._senders[node, boot] = known
            known.mark(counter)
            return OpenedPacket(node.hex(), boot, data, token)
        self.refused[DropReason.FOREIGN] += 1
        return None


def _cipher(token: bytes, node: bytes, boot: int) -> ChaCha20Poly1305:
    info = b"sollold gossip 1" + node + boot.to_bytes(8, "big")
    return ChaCha20Poly1305(HKDF(SHA256(), 32, salt=None, info=info).derive(token))
