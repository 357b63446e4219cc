"""What is known of one other node: its state, its addresses and its own signed words."""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache

from sollold.cluster.gossip.actions import Address
from sollold.cluster.gossip.double import Processes
from sollold.cluster.gossip.packet import Alive, Dead, Left, MemberState, encode
from sollold.cluster.gossip.record_check import is_ip
from sollold.cluster.gossip.suspicion import Suspicion

_LATE = 3
"""How many times its time a slow node may get more."""


class Status(IntEnum):
    """What is held of a node."""

    ALIVE = 0
    SUSPECT = 1
    DEAD = 2
    LEFT = 3


class Member:
    """What this node holds of another: its state, its addresses, and how long it has been silent."""

    __slots__ = (
        "addresses",
        "agreed",
        "boot",
        "farewell",
        "heard",
        "incarnation",
        "key",
        "late",
        "lost",
        "node",
        "processes",
        "reached",
        "signature",
        "since",
        "status",
        "suspicion",
    )

    def __init__(self, alive: Alive, now: float) -> None:
        self.node = alive.node
        self.boot = alive.boot
        self.incarnation = alive.incarnation
        self.addresses: tuple[Address, ...] = alive.addresses
        self.key = alive.key
        self.signature = alive.signature
        self.farewell = b""
        self.reached: Address | None = None
        """Where its last datagram came from."""
        self.heard = float("-inf")
        """When that was."""
        self.agreed = float("-inf")
        """When it last knew the same as this node."""
        self.status = Status.ALIVE
        self.since = now
        self.suspicion: Suspicion | None = None
        self.lost: frozenset[str] = frozenset()
        """Of the hosts that it told before, those that it told no more when it last moved."""
        self.processes = Processes()
        self.late = 0
        """How many times longer than others it gets to answer."""

    def slowed(self) -> None:
        """It answered too late."""
        self.late = min(self.late + 1, _LATE)

    def quickened(self) -> None:
        """It answered in the time that everybody has."""
        self.late = max(self.late - 1, 0)

    @property
    def live(self) -> bool:
        """Alive as far as anybody may say; suspects are."""
        return self.status <= Status.SUSPECT

    def address(self) -> Address | None:
        """The best one to reach it at."""
        return self.reached or (self.addresses[0] if self.addresses else None)

    def everywhere(self) -> tuple[Address, ...]:
        """All its addresses, the best first."""
        if self.reached is None:
            return self.addresses
        return (self.reached, *(address for address in self.addresses if address != self.reached))

    def alive(self) -> bytes:
        """The last sign of life it gave."""
        return encode(Alive(self.node, self.boot, self.incarnation, self.addresses, self.key, self.signature))

    def summary(self, version: int, version_boot: int) -> MemberState:
        """What is known of it, for a push-pull, with the version of its record."""
        return MemberState(
            self.node,
            self.boot,
            self.incarnation,
            self.status,
            self.addresses,
            version,
            version_boot,
            self.key,
            self.signature,
            self.farewell,
            (self.reached,) if self.reached is not None else (),
        )

    def state(self) -> list[bytes]:
        """What is known of it, as messages, for itself: with its own words, which it believes."""
        if self.status is Status.LEFT:
            return [encode(Left(self.node, self.incarnation, self.farewell))]
        if self.status is Status.DEAD:
            return [self.alive(), encode(Dead(self.node, self.incarnation, self.node))]
        return [self.alive()]


def plausible(said: Alive) -> bool:
    """Whether a node id and addresses are what they should be; checked when something new comes in."""
    return _is_node(said.node) and literal(said.addresses) == said.addresses


def literal(addresses: tuple[Address, ...]) -> tuple[Address, ...]:
    """Those that are IP literals: a name would have to be looked up, by the sender's wish."""
    return tuple(address for address in addresses if is_ip(address[0]))


@lru_cache(4096)
def _is_node(node: str) -> bool:
    return len(node) == 16 and all(digit in "0123456789abcdef" for digit in node)
