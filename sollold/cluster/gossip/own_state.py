"""This node's own membership state, and how it refutes statements about itself.

Only a node itself raises its incarnation. It signs its statements: that it lives and where, that it left.
"""

from __future__ import annotations

from collections.abc import Callable

from sollold.cluster.gossip.actions import Address, Change
from sollold.cluster.gossip.awareness import Awareness
from sollold.cluster.gossip.broadcast_queue import BroadcastQueue
from sollold.cluster.gossip.member import Status
from sollold.cluster.gossip.packet import Alive, Left, MemberState, encode
from sollold.cluster.gossip.signing import Signer, alive_content, left_content

_CLONE_RAISES = 4
"""Refutations in our name by another process before it counts as a clone: echoes cause fewer."""
_REFUTE_PAUSE = 20.0
"""Seconds between refutations of a clone: the two would refute each other forever, and all others log it."""
_CLONE_PAUSE = 60.0
"""Minimum seconds between reports of messages from a clone."""
_MAX_AHEAD = 1024
"""Accusations whose incarnation exceeds ours by more than this are refused: no honest node makes them."""


class OwnState:
    """This node's own entry in the membership.

    Attributes:
        refused: number of accusations with an implausible incarnation.
        withdrawn: another process with our node id started earlier: this one makes no more statements.
        double: the host of another process that uses our node id; empty: none is known.
    """

    def __init__(
        self,
        node: str,
        boot: int,
        incarnation: int,
        addresses: tuple[Address, ...],
        *,
        news: BroadcastQueue,
        awareness: Awareness,
        signer: Signer,
        changed: Callable[[Change, str], None],
    ) -> None:
        self.node = node
        self.boot = boot
        self.incarnation = incarnation
        self.addresses = addresses
        self.leaving = False
        self.refused = 0
        self.withdrawn = False
        self.double = ""
        self._news = news
        self._awareness = awareness
        self._signer = signer
        self._changed = changed
        self._alive: Alive | None = None
        self._farewell = b""
        self._foreign_boot = 0
        self._foreign_raises = 0
        self._refute_after = 0.0
        self._double_after = 0.0

    # Own statements

    def alive(self) -> bytes:
        """Return this node's signed `Alive` message, encoded."""
        return encode(self._sign())

    def state(self, version: int) -> MemberState:
        """Return this node's state for a push-pull, with the version of its record."""
        alive = self._sign()
        status = Status.LEFT if self.leaving else Status.ALIVE
        return MemberState(
            self.node,
            self.boot,
            self.incarnation,
            status,
            self.addresses,
            version,
            self.boot,
            alive.key,
            alive.signature,
            self._farewell,
        )

    def _sign(self) -> Alive:
        alive = self._alive
        if alive is None or (alive.incarnation, alive.addresses) != (self.incarnation, self.addresses):
            content = alive_content(self.node, self.boot, self.incarnation, self.addresses)
            signature = self._signer.sign(content)
            alive = self._alive = Alive(
                self.node, self.boot, self.incarnation, self.addresses, self._signer.public, signature
            )
        return alive

    def announce(self) -> None:
        """Broadcast this node's `Alive` message."""
        if self.withdrawn:
            return
        self._news.add("member", self.node, self.alive())

    def move(self, addresses: tuple[Address, ...]) -> None:
        """Change this node's addresses and broadcast them."""
        self.addresses = addresses
        self.incarnation += 1
        self.announce()

    def leave(self) -> bytes:
        """Broadcast `Left` and stop refuting. Returns the message."""
        self.leaving = True
        self._news.withdraw("member", self.node)
        self._farewell = self._signer.sign(left_content(self.node, self.incarnation))
        message = encode(Left(self.node, self.incarnation, self._farewell))
        self._news.add("member", self.node, message)
        return message

    # Received statements about this node

    def hear_alive(self, alive: Alive, now: float) -> None:
        """Handle an `Alive` made by another process with this node's key: an echo, or a clone."""
        if alive.boot != self._foreign_boot:
            self._foreign_boot, self._foreign_raises = alive.boot, 0
        self._foreign_raises += 1
        if self._foreign_raises >= _CLONE_RAISES:
            if now < self._refute_after:
                return
            self._refute_after = now + _REFUTE_PAUSE
            host = alive.addresses[0][0] if alive.addresses else ""
            self.hear_double(alive.boot, host, now, signed=True)
        self.refute(alive.incarnation)

    def hear_double(self, boot: int, host: str, now: float, *, signed: bool = False) -> bool:
        """Handle a message from a clone, another process with our node id. False if it was reported recently.

        The process that started first stays, in this node's view as in all others'. But any member can send
        a datagram in our name: only ``signed`` statements of the other process make this one withdraw.
        """
        self.double = host or self.double
        withdraws = signed and boot < self.boot and not self.withdrawn
        if withdraws:
            self.withdrawn = True
            self._news.withdraw("member", self.node)
        if now < self._double_after and not withdraws:
            return False
        self._double_after = now + _CLONE_PAUSE
        self._changed(Change.CLONED, self.node)
        return True

    def take_part(self) -> None:
        """Take part again: no other process uses our node id any more."""
        self.withdrawn = False
        self.double = ""

    def hear_accusation(self, incarnation: int) -> None:
        """Refute a suspicion or a statement that this node is dead."""
        if incarnation > self.incarnation + _MAX_AHEAD:
            # We never announced it: refuting it would use up our counter.
            self.refused += 1
            return
        self.refute(incarnation, accused=True)

    def refute(self, incarnation: int, *, accused: bool = False) -> None:
        """Announce with a higher incarnation that this node lives, unless ``incarnation`` is outdated."""
        if self.leaving or self.withdrawn or incarnation < self.incarnation:
            return
        self.incarnation = incarnation + 1
        if accused:
            self._awareness.worse()
        self.announce()
        self._changed(Change.CLEARED, self.node)
