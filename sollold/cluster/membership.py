"""Who is alive, suspected, dead or gone: the table of SWIM with Lifeguard's suspicion.

Only a node itself raises its incarnation, and does so to refute what is said of it. An accusation counts
from the incarnation it names on; a sign of life only above it. So old gossip brings nobody back, while a
restarted process, which is told what is held of it, comes back by one refutation.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from functools import lru_cache
from ipaddress import ip_address
from random import Random

from sollold.cluster.actions import Address, Change
from sollold.cluster.awareness import Awareness
from sollold.cluster.broadcast import News
from sollold.cluster.packet import Alive, Dead, Held, Left, Suspect, encode
from sollold.cluster.probe_order import ProbeOrder
from sollold.cluster.suspicion import Suspicion
from sollold.cluster.timers import Timers
from sollold.cluster.tuning import Tuning

_CLONE_RAISES = 4
"""Refutations in our name by one other process before it is called a clone: echoes make fewer."""
_REFUTE_PAUSE = 1.0
"""Seconds between refutations of a clone: the two would go on for ever."""
_CLONE_PAUSE = 60.0
"""Seconds between words about packets that come in our own name."""
_LATE = 3
"""How many times its time a slow node may get more."""
_OBJECTION = 2.0
"""Probe intervals that a node gets which only others hold dead."""
_MOST = 4096
"""Nodes known at most, the dead among them: nobody fills the memory with invented names."""
_HURRY = 8
"""How many peers, about, probe a new suspect at once."""


class Status(IntEnum):
    """What is held of a node."""

    ALIVE = 0
    SUSPECT = 1
    DEAD = 2
    LEFT = 3


class Member:
    """Another node."""

    __slots__ = (
        "addresses",
        "boot",
        "incarnation",
        "late",
        "node",
        "reached",
        "since",
        "status",
        "suspicion",
    )

    def __init__(self, alive: Alive, now: float) -> None:
        self.node = alive.node
        self.boot = alive.boot
        self.incarnation = alive.incarnation
        self.addresses: tuple[Address, ...] = alive.addresses
        self.reached: Address | None = None
        """Where its last datagram came from."""
        self.status = Status.ALIVE
        self.since = now
        self.suspicion: Suspicion | None = None
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

    def said(self) -> bytes:
        """What is held of it, as a message."""
        if self.status is Status.LEFT:
            return encode(Left(self.node, self.incarnation))
        if self.status is Status.DEAD:
            return encode(Dead(self.node, self.incarnation, self.node))
        return encode(Alive(self.node, self.boot, self.incarnation, self.addresses))


class Membership:
    """The table, and what follows from each thing heard.

    Args:
        changed: called with each change, after the table has it.
    """

    def __init__(
        self,
        me: str,
        boot: int,
        incarnation: int,
        addresses: tuple[Address, ...],
        *,
        random: Random,
        tuning: Tuning,
        timers: Timers,
        news: News,
        awareness: Awareness,
        changed: Callable[[Change, str], None],
    ) -> None:
        self.me = me
        self.boot = boot
        self.incarnation = incarnation
        self.addresses = addresses
        self.leaving = False
        self.members: dict[str, Member] = {}
        self.live: list[str] = []
        """Other nodes alive or suspected; in no order."""
        self.order = ProbeOrder(random)
        self.retransmits = tuning.retransmits(1)
        """How often each piece of news is sent in a cluster of this size."""
        self._place: dict[str, int] = {}
        self._random = random
        self._tuning = tuning
        self._timers = timers
        self._news = news
        self._awareness = awareness
        self._changed = changed
        self._foreign_boot = 0
        self._foreign_raises = 0
        self._refute_after = 0.0
        self._double_after = 0.0

    @property
    def size(self) -> int:
        """Live nodes, this one included."""
        return len(self.live) + 1

    def my_alive(self) -> bytes:
        """What this node says of itself."""
        return encode(Alive(self.me, self.boot, self.incarnation, self.addresses))

    def announce(self) -> None:
        """Spread what this node says of itself."""
        self._news.add("member", self.me, self.my_alive())

    def sample(self, count: int, *, without: str = "") -> list[Member]:
        """Up to ``count`` live others, at random."""
        chosen = self.live
        if len(chosen) > count:
            chosen = self._random.sample(chosen, count + 1 if without else count)
        return [self.members[node] for node in chosen if node != without][:count]

    # What is heard

    def hear_alive(self, said: Alive, now: float) -> None:
        """``said.node`` lives, or did when it said so."""
        if said.node == self.me:
            self._hear_own_alive(said, now)
            return
        member = self.members.get(said.node)
        if member is None:
            if not plausible(said) or not self._make_room():
                return
            member = self.members[said.node] = Member(said, now)
            self._enter(member)
            self._spread(member)
            self._changed(Change.JOINED, member.node)
            return
        if said.incarnation <= member.incarnation or not plausible(said):
            return
        restarted, moved = said.boot != member.boot, said.addresses != member.addresses
        before = member.status
        member.boot = said.boot
        member.incarnation = said.incarnation
        member.addresses = said.addresses
        if restarted or (moved and member.reached not in said.addresses):
            member.reached = None
        member.status = Status.ALIVE
        member.suspicion = None
        self._spread(member)
        if before >= Status.DEAD:
            member.since = now
            self._enter(member)
            self._changed(Change.JOINED, member.node)
        elif restarted:
            self._changed(Change.RESTARTED, member.node)
        elif moved:
            self._changed(Change.MOVED, member.node)
        elif before is Status.SUSPECT:
            self._changed(Change.CLEARED, member.node)

    def hear_double(self, now: float) -> bool:
        """Another process sends in our own name: a clone. False when that was told just now."""
        if now < self._double_after:
            return False
        self._double_after = now + _CLONE_PAUSE
        self._changed(Change.CLONED, self.me)
        return True

    def hear_suspect(self, node: str, incarnation: int, by: str, now: float) -> None:
        """``by`` heard nothing of ``node``."""
        if node == self.me:
            self._refute(incarnation, accused=True)
            return
        member = self.members.get(node)
        if member is None or incarnation < member.incarnation or not member.live:
            return
        if self._accuse(member, incarnation, by, now) and self._random.random() * self.size < _HURRY:
            self.order.hurry(node)

    def hear_dead(self, node: str, incarnation: int, by: str, now: float) -> None:
        """``node`` had its time, says ``by``. Whom this node does not suspect itself gets a moment to object.

        A node that was cut off holds all others dead, and says so when it is back: two that hear of it
        must not part.
        """
        if node == self.me:
            self._refute(incarnation, accused=True)
            return
        member = self.members.get(node)
        if member is None or not member.live or incarnation < member.incarnation:
            return
        if member.suspicion is not None and member.suspicion.has(self.me):
            self._end(member, incarnation, Status.DEAD, now)
            return
        self._accuse(member, incarnation, by, now)
        within = _OBJECTION * self._tuning.probe_interval
        if member.suspicion is not None and member.suspicion.quicken(within, now):
            self.order.hurry(node)
            self._timers.at(member.suspicion.deadline, self._expire, node, member.suspicion)
            self._news.add("member", node, encode(Dead(node, incarnation, by)))

    def hear_left(self, node: str, incarnation: int, now: float) -> None:
        """``node`` said goodbye."""
        if node == self.me:
            self._refute(incarnation, accused=False)
            return
        member = self.members.get(node)
        if member is None or incarnation < member.incarnation or member.status is Status.LEFT:
            return
        if member.live:
            self._end(member, incarnation, Status.LEFT, now)
        else:
            member.status = Status.LEFT
            member.incarnation = incarnation

    def hear_held(self, held: Held, by: str, now: float) -> None:
        """A peer's view of a node, from a push-pull. Its dead are but suspects here: they may refute."""
        if held.status == Status.LEFT:
            self.hear_left(held.node, held.incarnation, now)
            return
        if held.status != Status.DEAD:
            self.hear_alive(Alive(held.node, held.boot, held.incarnation, held.addresses), now)
        if held.status != Status.ALIVE:
            self.hear_suspect(held.node, held.incarnation, by, now)

    # What this node finds

    def suspect(self, node: str, now: float, *, within: float | None = None) -> None:
        """This node heard nothing of ``node``. ``within``: other evidence allows but so many seconds."""
        member = self.members.get(node)
        if member is None or not member.live:
            return
        self._accuse(member, member.incarnation, self.me, now)
        if within is not None and member.suspicion is not None and member.suspicion.quicken(within, now):
            self._timers.at(member.suspicion.deadline, self._expire, node, member.suspicion)

    def relax(self, node: str) -> None:
        """``node`` answered this node after its link broke: what is left of the suspicion takes its time."""
        member = self.members.get(node)
        if member is not None and member.suspicion is not None:
            member.suspicion.relax()

    def move(self, addresses: tuple[Address, ...]) -> None:
        """This node's addresses changed."""
        self.addresses = addresses
        self.incarnation += 1
        self.announce()

    def leave(self) -> bytes:
        """Say goodbye, and no longer refute."""
        self.leaving = True
        self._news.drop("member", self.me)
        message = encode(Left(self.me, self.incarnation))
        self._news.add("member", self.me, message)
        return message

    def shift(self, seconds: float) -> None:
        """The process stood still for so long: suspects get that time back."""
        for node in self.live:
            suspicion = self.members[node].suspicion
            if suspicion is not None:
                suspicion.started += seconds

    def forget(self, now: float) -> None:
        """Drop those dead or gone for long."""
        until = now - self._tuning.forget_after
        gone = [m.node for m in self.members.values() if not m.live and m.since < until]
        for node in gone:
            del self.members[node]

    def _make_room(self) -> bool:
        """Drop the longest dead when there are too many; False when all are alive."""
        if len(self.members) < _MOST:
            return True
        gone = min((m for m in self.members.values() if not m.live), key=lambda m: m.since, default=None)
        if gone is None:
            return False
        del self.members[gone.node]
        return True

    # Transitions

    def _accuse(self, member: Member, incarnation: int, by: str, now: float) -> bool:
        """Begin or confirm a suspicion; True when it begins."""
        suspicion = member.suspicion
        if suspicion is not None:
            member.incarnation = incarnation
            if suspicion.confirm(by):
                self._news.add("member", member.node, encode(Suspect(member.node, incarnation, by)))
                self._timers.at(suspicion.deadline, self._expire, member.node, suspicion)
            return False
        tuning = self._tuning
        wanted = tuning.confirmations if self.size - 2 >= tuning.confirmations else 0
        least = tuning.suspicion_min(self.size)
        suspicion = Suspicion(by, now, least=least, most=least * tuning.suspicion_max, wanted=wanted)
        member.incarnation = incarnation
        member.status = Status.SUSPECT
        member.suspicion = suspicion
        self._news.add("member", member.node, encode(Suspect(member.node, incarnation, by)))
        self._timers.at(suspicion.deadline, self._expire, member.node, suspicion)
        self._changed(Change.SUSPECTED, member.node)
        return True

    def _expire(self, node: str, suspicion: Suspicion, now: float) -> None:
        member = self.members.get(node)
        if member is None or member.suspicion is not suspicion:
            return
        if now < suspicion.deadline:
            self._timers.at(suspicion.deadline, self._expire, node, suspicion)
            return
        self._end(member, member.incarnation, Status.DEAD, now)

    def _end(self, member: Member, incarnation: int, status: Status, now: float) -> None:
        member.incarnation = incarnation
        member.status = status
        member.suspicion = None
        member.since = now
        self._exit(member)
        if status is Status.DEAD:
            self._news.add("member", member.node, encode(Dead(member.node, incarnation, self.me)))
            self._changed(Change.DIED, member.node)
        else:
            self._news.add("member", member.node, encode(Left(member.node, incarnation)))
            self._changed(Change.LEFT, member.node)

    def _hear_own_alive(self, said: Alive, now: float) -> None:
        if said.boot == self.boot or said.incarnation < self.incarnation:
            return
        if said.boot != self._foreign_boot:
            self._foreign_boot, self._foreign_raises = said.boot, 0
        self._foreign_raises += 1
        if self._foreign_raises >= _CLONE_RAISES:
            if now < self._refute_after:
                return
            self._refute_after = now + _REFUTE_PAUSE
            self._changed(Change.CLONED, self.me)
        self._refute(said.incarnation, accused=False)

    def _refute(self, incarnation: int, *, accused: bool) -> None:
        if self.leaving or incarnation < self.incarnation:
            return
        self.incarnation = incarnation + 1
        if accused:
            self._awareness.worse()
        self.announce()
        self._changed(Change.CLEARED, self.me)

    def _spread(self, member: Member) -> None:
        message = encode(Alive(member.node, member.boot, member.incarnation, member.addresses))
        self._news.add("member", member.node, message)

    def _enter(self, member: Member) -> None:
        self._place[member.node] = len(self.live)
        self.live.append(member.node)
        self.order.add(member.node)
        self.retransmits = self._tuning.retransmits(self.size)

    def _exit(self, member: Member) -> None:
        at, last = self._place.pop(member.node), self.live.pop()
        if last != member.node:
            self.live[at] = last
            self._place[last] = at
        self.order.remove(member.node)
        self.retransmits = self._tuning.retransmits(self.size)


def plausible(said: Alive) -> bool:
    """Whether a node id and addresses are what they should be; checked when something new comes in."""
    return _is_node(said.node) and literal(said.addresses) == said.addresses


def literal(addresses: tuple[Address, ...]) -> tuple[Address, ...]:
    """Those that are IP literals: a name would have to be looked up, by the sender's wish."""
    return tuple(address for address in addresses if _is_ip(address[0]))


@lru_cache(4096)
def _is_node(node: str) -> bool:
    return len(node) == 16 and all(digit in "0123456789abcdef" for digit in node)


@lru_cache(4096)
def _is_ip(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
