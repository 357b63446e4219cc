"""Stores the secret of a cluster that was founded here or admitted this node, in the state folder."""

from __future__ import annotations

import logging
import secrets
import time
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from sollold.cluster.net.identity import OPEN_TOKEN, Tokens
from sollold.facts import dataclass
from sollold.settings.state_file import (
    close_to_others,
    keep_copy,
    read_bounded,
    why_not_writable,
    write_whole,
)
from sollold.undecodable import UNDECODABLE

log = logging.getLogger("sollold.cluster")

MAX_MEMBERS = 256
"""Maximum machines that a keyring remembers, and maximum evicted ones."""
MAX_OLD = 4
MAX_GENERATION = 2**40

# The patterns alone would allow a line break at the end.
Secret = Annotated[str, Meta(pattern="^[0-9a-f]{64}$", max_length=64)]
NodeId = Annotated[str, Meta(pattern="^[0-9a-f]{16}$", max_length=16)]
Founder = Annotated[str, Meta(pattern="^([0-9a-f]{16})?$", max_length=16)]
"""Id of the node that founded a cluster; empty for an open cluster."""
DisplayName = Annotated[str, Meta(max_length=64)]
Generation = Annotated[int, Meta(ge=0, le=MAX_GENERATION)]


@dataclass(frozen=True, slots=True)
class Admitted:
    """A machine that this node admitted. ``at``: Unix time; ``by``: ``door``, ``admin`` or ``invitation``."""

    node: str
    name: str
    by: str
    at: float


@dataclass(frozen=True, slots=True)
class KeyringMember:
    """A machine that has, or had, the secret. ``name``: display name."""

    node: NodeId
    name: DisplayName


Members = Annotated[tuple[KeyringMember, ...], Meta(max_length=MAX_MEMBERS)]


@dataclass(frozen=True, slots=True)
class Pending:
    """A secret that is accepted but not used yet, and the members of the cluster once it is.

    Attributes:
        founder: founder of the cluster, which a node of an open one does not know before.
    """

    secret: Secret
    generation: Generation
    founder: NodeId
    members: Members = ()
    evicted: Members = ()


@dataclass(frozen=True, slots=True)
class Keyring:
    """A cluster's secret and how this node got it.

    Attributes:
        secret: 64 hex digits.
        founder: id of the node that founded the cluster; ``founded``: Unix time, by this machine's clock.
        alone: this node founded it and has admitted no other.
        admitted_by: id of the node that admitted this one; empty for the founder.
        admitted: machines admitted by this node, the latest last.
        closed: an admin ended the time in which any machine that asks is admitted.
        generation: number of changes of the secret; ``old``: former secrets that are still accepted.
        pending: the next secret, while it is being changed.
        members: machines that may fetch the secret by their own key: current and former peers.
        evicted: machines that an admin evicted: their keys are refused.
        secured: an admin closed an open cluster with it; it then overrides the setting.
    """

    secret: Secret
    founder: str
    founded: float
    alone: bool = True
    admitted_by: str = ""
    admitted: tuple[Admitted, ...] = ()
    closed: bool = False
    generation: Generation = 0
    old: tuple[Secret, ...] = ()
    pending: Pending | None = None
    members: Members = ()
    evicted: Members = ()
    secured: bool = False

    @property
    def open(self) -> bool:
        """Whether this represents an open cluster, whose secret is public. It is not saved on disk."""
        return self.secret == OPEN_TOKEN.hex()

    @property
    def tokens(self) -> Tokens:
        """Accepted tokens: the secret in use first, then the next one, then old ones."""
        upcoming = (self.pending.secret,) if self.pending is not None else ()
        return Tokens.read(self.secret, (*upcoming, *self.old))

    @property
    def newest(self) -> int:
        """The highest generation in use or pending here."""
        return max(self.generation, self.pending.generation if self.pending is not None else 0)

    @property
    def refused(self) -> frozenset[str]:
        """Ids of nodes whose keys are refused."""
        upcoming = self.pending.evicted if self.pending is not None else ()
        return frozenset(member.node for member in (*self.evicted, *upcoming))

    @property
    def known(self) -> frozenset[str]:
        """Ids of nodes that may fetch the secret by their own key."""
        admitted, seen = {member.node for member in self.admitted}, {member.node for member in self.members}
        return frozenset(admitted | seen | {self.founder, self.admitted_by}) - self.refused - {""}

    @classmethod
    def for_open(cls) -> Keyring:
        """Return the keyring that represents an open cluster."""
        return cls(OPEN_TOKEN.hex(), "", 0.0, alone=False, closed=True)

    @classmethod
    def found(cls, node: str) -> Keyring:
        """Found a new cluster with a random secret."""
        return cls(secrets.token_hex(32), node, time.time())

    def age(self) -> float:
        """Return seconds since the founding; infinity if the clock was set back beyond it."""
        age = time.time() - self.founded
        return age if age >= 0 else float("inf")


class DamagedKeyring(ValueError):
    """The keyring file is invalid; the message says where and why."""


class KeyringFile:
    """The file ``keyring`` in the state folder, readable by its owner only. Its methods block on disk I/O."""

    def __init__(self, state: Path) -> None:
        self._path = state / "keyring"

    def read(self) -> Keyring | None:
        """Read the keyring; None if there is no file.

        Raises:
            DamagedKeyring: the file is invalid; a copy was kept.
            OSError: the file can't be read, or not copied.
        """
        try:
            close_to_others(self._path)
            data = read_bounded(self._path)
        except FileNotFoundError:
            return None
        try:
            return msgspec.json.decode(data, type=Keyring)
        except UNDECODABLE as error:
            copy = keep_copy(self._path, data)
            raise DamagedKeyring(f"{self._path} is damaged ({error}); a copy is in {copy}") from None

    def load(self, node: str) -> Keyring:
        """Read the keyring; if it is missing or damaged, found a new cluster by ``node``.

        Raises:
            OSError: the file can't be read or written.
        """
        try:
            ring = self.read()
        except DamagedKeyring as error:
            log.error("%s; this machine founds a cluster, and asks members that know it for admission", error)
            ring = None
        if ring is None:
            ring = Keyring.found(node)
            self.write(ring)
        return ring

    def write(self, ring: Keyring) -> None:
        """Replace the file.

        Raises:
            OSError: the file can't be written.
        """
        write_whole(self._path, msgspec.json.format(msgspec.json.encode(ring), indent=1))

    def why_not_kept(self) -> str:
        """Return why no keyring can be written now, and what to do; empty if it can."""
        fault = why_not_writable(self._path.parent)
        return f"nothing can be written to {self._path.parent} ({fault}); fix that first" if fault else ""
