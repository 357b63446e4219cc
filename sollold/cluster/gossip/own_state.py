"""What this node says of itself, and how it refutes what others say of it.

Only a node itself raises its incarnation. What it says is signed: that it lives and where, and its goodbye.
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
"""Refutations in our name by one other process before it is called a clone: echoes make fewer."""
_REFUTE_PAUSE = 20.0
"""Seconds between refutations of a clone: the two go on for ever, and all others log each."""
_CLONE_PAUSE = 60.0
"""Seconds between words about packets that come in our own name."""
_ACCUSED_AHEAD = 1024
"""An accusation that names an incarnation this far above our own is not made by a node that counts."""


class OwnState:
    """This node in the table of members.

    Attributes:
        refused: accusations that name a count that nobody reaches.
        withdrawn: another process that started earlier uses our node id: this one says no more of itself.
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

    # What is said

    def alive(self) -> bytes:
        """That this node lives, and where."""
        return encode(self._sign())

    def state(self, version: int) -> MemberState:
        """The same for a push-pull, with the version of the record."""
        said = self._sign()
        status = Status.LEFT if self.leaving else Status.ALIVE
        return MemberState(
            self.node,
            self.boot,
            self.incarnation,
            status,
            self.addresses,
            version,
            self.boot,
            said.key,
            said.signature,
            self._farewell,
        )

    def _sign(self) -> Alive:
        made = self._alive
        if made is None or (made.incarnation, made.addresses) != (self.incarnation, self.addresses):
            content = alive_content(self.node, self.boot, self.incarnation, self.addresses)
            signature = self._signer.sign(content)
            made = self._alive = Alive(
                self.node, self.boot, self.incarnation, self.addresses, self._signer.public, signature
            )
        return made

    def announce(self) -> None:
        """Spread that this node lives."""
        if self.withdrawn:
            return
        self._news.add("member", self.node, self.alive())

    def move(self, addresses: tuple[Address, ...]) -> None:
        """This node's addresses changed."""
        self.addresses = addresses
        self.incarnation += 1
        self.announce()

    def leave(self) -> bytes:
        """Say goodbye, and no longer refute."""
        self.leaving = True
        self._news.withdraw("member", self.node)
        self._farewell = self._signer.sign(left_content(self.node, self.incarnation))
        message = encode(Left(self.node, self.incarnation, self._farewell))
        self._news.add("member", self.node, message)
        return message

    # What is heard of this node

    def hear_alive(self, said: Alive, now: float) -> None:
        """Another process says so in this node's name, with its signature: an echo, or a clone."""
        if said.boot != self._foreign_boot:
            self._foreign_boot, self._foreign_raises = said.boot, 0
        self._foreign_raises += 1
        if self._foreign_raises >= _CLONE_RAISES:
            if now < self._refute_after:
                return
            self._refute_after = now + _REFUTE_PAUSE
            self.hear_double(said.boot, said.addresses[0][0] if said.addresses else "", now)
        self.refute(said.incarnation)

    def hear_double(self, boot: int, host: str, now: float) -> bool:
        """Another process sends in our own name: a clone. False when that was told just now.

        The one that started first stays, as all others hold it.
        """
        self.double = host or self.double
        withdraws = boot < self.boot and not self.withdrawn
        if withdraws:
            self.withdrawn = True
            self._news.withdraw("member", self.node)
        if now < self._double_after and not withdraws:
            return False
        self._double_after = now + _CLONE_PAUSE
        self._changed(Change.CLONED, self.node)
        return True

    def take_part(self) -> None:
        """Nobody else lives in our name any more."""
        self.withdrawn = False
        self.double = ""

    def hear_accusation(self, incarnation: int) -> None:
        """Somebody suspects this node, or holds it dead."""
        if incarnation > self.incarnation + _ACCUSED_AHEAD:
            # Nobody has heard it from us: refuting it would use up our counter.
            self.refused += 1
            return
        self.refute(incarnation, accused=True)

    def refute(self, incarnation: int, *, accused: bool = False) -> None:
        """Say with a higher incarnation that this node lives, where ``incarnation`` counts at all."""
        if self.leaving or self.withdrawn or incarnation < self.incarnation:
            return
        self.incarnation = incarnation + 1
        if accused:
            self._awareness.worse()
        self.announce()
        self._changed(Change.CLEARED, self.node)
