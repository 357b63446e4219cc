"""State of one other node: its status, its addresses and its own signed statements."""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache

from sollold.cluster.gossip.actions import Address
from sollold.cluster.gossip.double import Processes
from sollold.cluster.gossip.packet import Alive, Dead, Left, MemberState, encode
from sollold.cluster.gossip.record_check import is_ip
from sollold.cluster.gossip.suspicion import Suspicion

_MAX_LATE = 3
"""Maximum additional timeouts granted to a slow node."""


class Status(IntEnum):
    """Status of a node in the view of another."""

    ALIVE = 0
    SUSPECT = 1
    DEAD = 2
    LEFT = 3


class Member:
    """One other node as seen from this one: its status, its addresses and when it was last heard."""

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
        "unanswered",
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
        """Address that its last datagram came from."""
        self.heard = float("-inf")
        """Time of its last datagram."""
        self.agreed = float("-inf")
        """Time when its digest last equalled this node's."""
        self.status = Status.ALIVE
        self.since = now
        self.suspicion: Suspicion | None = None
        self.lost: frozenset[str] = frozenset()
        """Hosts that it had before its last move and no longer has."""
        self.processes = Processes()
        self.unanswered = 0
        """Number of probes that timed out since its last ack; acks come by datagram only."""
        self.late = 0
        """Number of additional timeouts it gets to respond; 0 for a node that is on time."""

    def slowed(self) -> None:
        """Grant it more time: it responded too late."""
        self.late = min(self.late + 1, _MAX_LATE)

    def quickened(self) -> None:
        """Grant it less time again: it responded on time."""
        self.late = max(self.late - 1, 0)

    @property
    def live(self) -> bool:
        """Whether it is alive or suspected."""
        return self.status <= Status.SUSPECT

    def address(self) -> Address | None:
        """Return its best address: the one it was last heard from, else the first it announced."""
        return self.reached or (self.addresses[0] if self.addresses else None)

    def everywhere(self) -> tuple[Address, ...]:
        """Return all its addresses, the best first."""
        if self.reached is None:
            return self.addresses
        return (self.reached, *(address for address in self.addresses if address != self.reached))

    def alive(self) -> bytes:
        """Return its last signed `Alive` message, encoded."""
        return encode(Alive(self.node, self.boot, self.incarnation, self.addresses, self.key, self.signature))

    def summary(self, version: int, version_boot: int) -> MemberState:
        """Return its state for a push-pull, with the version of its record."""
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
        """Return its state as messages for the node itself, in its own signed statements, which it trusts."""
        if self.status is Status.LEFT:
            return [encode(Left(self.node, self.incarnation, self.farewell))]
        if self.status is Status.DEAD:
            return [self.alive(), encode(Dead(self.node, self.incarnation, self.node))]
        return [self.alive()]


def plausible(alive: Alive) -> bool:
    """Whether node id and addresses are well formed; checked for each new statement."""
    return _is_node(alive.node) and literal(alive.addresses) == alive.addresses


def literal(addresses: tuple[Address, ...]) -> tuple[Address, ...]:
    """Return the IP literals among them: a host name would have to be looked up at the sender's will."""
    return tuple(address for address in addresses if is_ip(address[0]))


@lru_cache(4096)
def _is_node(node: str) -> bool:
    return len(node) == 16 and all(digit in "0123456789abcdef" for digit in node)
