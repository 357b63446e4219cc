"""Membership table: who is alive, suspected, dead or left (SWIM with Lifeguard's suspicion).

Only a node itself raises its incarnation, and does so to refute statements about it
(`sollold.cluster.gossip.own_state`). An accusation counts if its incarnation is at least the known one; an
`Alive` only if it is above. So old gossip revives no node, while a restarted process, which is told its
recorded state, comes back by one refutation.

`Alive` and `Left` messages are signed by their node. Accusations are not, so they count for the incarnation
that the accused itself announced, whatever they name.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from sollold.cluster.gossip.actions import Address, Change
from sollold.cluster.gossip.broadcast_queue import BroadcastQueue
from sollold.cluster.gossip.config import Tuning
from sollold.cluster.gossip.member import Member, Status, literal, plausible
from sollold.cluster.gossip.own_state import OwnState
from sollold.cluster.gossip.packet import MAX_MEMBERS, Alive, Dead, Left, MemberState, Suspect, encode
from sollold.cluster.gossip.probe_order import ProbeOrder
from sollold.cluster.gossip.signing import Signer, alive_content, left_content
from sollold.cluster.gossip.suspicion import Suspicion
from sollold.cluster.gossip.timers import Timers

_OBJECTION_INTERVALS = 2.0
"""Probe intervals that a node has to refute when only others consider it dead."""
_HURRY_PEERS = 8
"""Approximate number of peers that probe a new suspect at once."""


class Membership:
    """The table of members and its transitions.

    Args:
        changed: called with each change, after the table was updated.

    Attributes:
        own: this node's own state.
    """

    def __init__(
        self,
        own: OwnState,
        *,
        random: Random,
        tuning: Tuning,
        timers: Timers,
        news: BroadcastQueue,
        signer: Signer,
        changed: Callable[[Change, str], None],
    ) -> None:
        self.own = own
        self.me = own.node
        self._refused = 0
        self.evicted: frozenset[str] = frozenset()
        """Evicted nodes; their `Alive` messages are ignored."""
        self.members: dict[str, Member] = {}
        self.live: list[str] = []
        """Other nodes that are alive or suspected, unordered."""
        self.order = ProbeOrder(random)
        self.retransmits = tuning.retransmits(1)
        """How often each message is sent in a cluster of this size."""
        self._positions: dict[str, int] = {}
        self._random = random
        self._tuning = tuning
        self._timers = timers
        self._news = news
        self._changed = changed
        self._signer = signer
        self._gone: dict[str, None] = {}
        """Dead and left nodes, the earliest first."""

    @property
    def refused(self) -> int:
        """Number of statements refused because of a wrong signature or an implausible incarnation."""
        return self._refused + self.own.refused

    @property
    def size(self) -> int:
        """Number of live nodes, including this one."""
        return len(self.live) + 1

    def key_of(self, node: str) -> bytes | None:
        """Return the public key of a known node; None if the node is unknown."""
        if node == self.me:
            return self._signer.public
        member = self.members.get(node)
        return member.key if member is not None else None

    def sample(self, count: int, *, without: str = "") -> list[Member]:
        """Return up to ``count`` other live nodes, chosen at random."""
        chosen = self.live
        if len(chosen) > count:
            chosen = self._random.sample(chosen, count + 1 if without else count)
        return [self.members[node] for node in chosen if node != without][:count]

    # Received statements

    def hear_alive(self, alive: Alive, now: float) -> None:
        """Handle an `Alive` message."""
        if alive.node == self.me:
            old = alive.boot == self.own.boot or alive.incarnation < self.own.incarnation
            if not old and self._signed(alive):
                self.own.hear_alive(alive, now)
            return
        if alive.node in self.evicted:
            return
        member = self.members.get(alive.node)
        if member is None:
            if not plausible(alive) or not self._signed(alive) or not self._make_room():
                return
            member = self.members[alive.node] = Member(alive, now)
            self._enter(member)
            self._spread(member)
            self._changed(Change.JOINED, member.node)
            return
        if alive.incarnation <= member.incarnation or not plausible(alive) or not self._signed(alive):
            return
        restarted, moved = alive.boot != member.boot, alive.addresses != member.addresses
        if restarted and not self._succeeds(member, alive, now):
            return
        before = member.status
        if moved:
            member.lost = frozenset(host for host, _ in member.addresses) - {
                host for host, _ in alive.addresses
            }
        member.boot = alive.boot
        member.incarnation = alive.incarnation
        member.addresses = alive.addresses
        member.key, member.signature = alive.key, alive.signature
        if restarted or (moved and member.reached not in alive.addresses):
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

    def _succeeds(self, member: Member, alive: Alive, now: float) -> bool:
        """Whether a new process replaces this member's: not if both live."""
        processes = member.processes
        if not member.live:
            processes.forget(alive.boot)
            return True
        if processes.barred(alive.boot):
            processes.hear(alive.boot, None, member.heard, now)
            return False
        before = processes.other(now)
        follows = processes.follows(member.boot, alive.boot, member.addresses, alive.addresses, now)
        if before is None and processes.other(now) is not None:
            self._changed(Change.DOUBLED, member.node)
        return follows

    def hear_other(self, member: Member, boot: int, source: Address, now: float) -> None:
        """Note a datagram of a live node that came from another process than the one that counts."""
        member.processes.hear(boot, source, member.heard, now)

    def barred(self, node: str, boot: int) -> bool:
        """Whether this process shares its node id with another live one and is ignored."""
        member = self.members.get(node)
        return member is not None and member.live and member.processes.barred(boot)

    def hear_suspect(self, node: str, incarnation: int, accuser: str, now: float) -> None:
        """Handle a suspicion of ``node`` by ``accuser``."""
        if node == self.me:
            self.own.hear_accusation(incarnation)
            return
        member = self.members.get(node)
        if member is None or incarnation < member.incarnation or not member.live:
            return
        if self._accuse(member, accuser, now) and self._random.random() * self.size < _HURRY_PEERS:
            self.order.hurry(node)

    def hear_dead(self, node: str, incarnation: int, accuser: str, now: float) -> None:
        """Handle a statement that ``node`` is dead. A node not suspected here gets time to refute it.

        A node that was cut off considers all others dead and says so when it is back: two nodes that hear it
        must not lose each other.
        """
        if node == self.me:
            self.own.take_part()
            self.own.hear_accusation(incarnation)
            return
        member = self.members.get(node)
        if member is None or not member.live or incarnation < member.incarnation:
            return
        if member.suspicion is not None and member.suspicion.has(self.me):
            self._end(member, Status.DEAD, now)
            return
        self._accuse(member, accuser, now)
        seconds = _OBJECTION_INTERVALS * self._tuning.probe_interval
        if member.suspicion is not None and member.suspicion.quicken(seconds, now):
            self.order.hurry(node)
            self._timers.at(member.suspicion.deadline, self._expire, node, member.suspicion)
            self._news.add("member", node, encode(Dead(node, member.incarnation, accuser)))

    def hear_left(self, node: str, incarnation: int, farewell: bytes, now: float) -> None:
        """Handle a `Left` message; ``farewell`` is the node's signature."""
        member = self.members.get(node)
        if node == self.me:
            if incarnation >= self.own.incarnation and self._signed_farewell(node, incarnation, farewell):
                self.own.take_part()
                self.own.refute(incarnation)
            return
        if member is None or incarnation < member.incarnation or member.status is Status.LEFT:
            return
        if not self._signed_farewell(node, incarnation, farewell):
            return
        member.incarnation, member.farewell = incarnation, farewell
        if member.live:
            self._end(member, Status.LEFT, now)
        else:
            member.status = Status.LEFT

    def hear_member_state(self, held: MemberState, sender: str, now: float) -> None:
        """Handle a peer's view of a node, from a push-pull. Its dead are only suspected: they may refute."""
        if held.status == Status.LEFT:
            self.hear_left(held.node, held.incarnation, held.farewell, now)
            return
        if held.status != Status.DEAD or held.node == self.me:
            new = held.node not in self.members
            alive = Alive(held.node, held.boot, held.incarnation, held.addresses, held.key, held.signature)
            self.hear_alive(alive, now)
            member = self.members.get(held.node) if new and literal(held.reached) == held.reached else None
            if member is not None and held.reached:
                member.reached = held.reached[0]
        if held.status != Status.ALIVE:
            self.hear_suspect(held.node, held.incarnation, sender, now)

    # Own observations

    def suspect(self, node: str, now: float, *, within: float | None = None) -> None:
        """Suspect ``node``, which did not respond. ``within``: end the suspicion after this many seconds."""
        member = self.members.get(node)
        if member is None or not member.live:
            return
        self._accuse(member, self.me, now)
        if within is not None and member.suspicion is not None and member.suspicion.quicken(within, now):
            self._timers.at(member.suspicion.deadline, self._expire, node, member.suspicion)

    def evict(self, nodes: frozenset[str], now: float) -> None:
        """Set the nodes evicted by an admin: they are declared dead at once and stay so."""
        self.evicted = nodes
        for node in nodes:
            member = self.members.get(node)
            if member is not None and member.live:
                self._end(member, Status.DEAD, now)

    def forget_others(self) -> None:
        """Drop all other nodes and the news of them: this node changes to another cluster."""
        for node in tuple(self.live):
            self._exit(self.members.pop(node))
            self._changed(Change.LEFT, node)
        self.members.clear()
        self._gone.clear()
        self._news.clear()

    def relax(self, node: str) -> None:
        """Restore the normal suspicion time of ``node``: it responded after its connection broke."""
        member = self.members.get(node)
        if member is not None and member.suspicion is not None:
            member.suspicion.relax()

    def shift(self, seconds: float) -> None:
        """Extend all suspicions by the seconds for which this process stood still."""
        for node in self.live:
            suspicion = self.members[node].suspicion
            if suspicion is not None:
                suspicion.started += seconds

    def forget(self, now: float) -> None:
        """Drop nodes that have been dead or left for long."""
        cutoff = now - self._tuning.forget_after
        while (node := next(iter(self._gone), None)) is not None and self.members[node].since < cutoff:
            del self._gone[node], self.members[node]

    def _make_room(self) -> bool:
        """Drop the earliest dead node if the table is full; False if all are alive."""
        if len(self.members) < MAX_MEMBERS:
            return True
        node = next(iter(self._gone), None)
        if node is None:
            return False
        del self._gone[node], self.members[node]
        return True

    # Transitions

    def _accuse(self, member: Member, accuser: str, now: float) -> bool:
        """Start or confirm a suspicion; True if it starts."""
        suspicion = member.suspicion
        if suspicion is not None:
            if suspicion.confirm(accuser):
                self._news.add(
                    "member", member.node, encode(Suspect(member.node, member.incarnation, accuser))
                )
                self._timers.at(suspicion.deadline, self._expire, member.node, suspicion)
            return False
        tuning = self._tuning
        wanted = tuning.confirmations if self.size - 2 >= tuning.confirmations else 0
        least = tuning.suspicion_min(self.size)
        suspicion = Suspicion(accuser, now, least=least, most=least * tuning.suspicion_max, wanted=wanted)
        member.status = Status.SUSPECT
        member.suspicion = suspicion
        self._news.add("member", member.node, encode(Suspect(member.node, member.incarnation, accuser)))
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
        self._end(member, Status.DEAD, now)

    def _end(self, member: Member, status: Status, now: float) -> None:
        member.status = status
        member.suspicion = None
        member.since = now
        self._exit(member)
        if status is Status.DEAD:
            self._news.add("member", member.node, encode(Dead(member.node, member.incarnation, self.me)))
            self._changed(Change.DIED, member.node)
        else:
            farewell = encode(Left(member.node, member.incarnation, member.farewell))
            self._news.add("member", member.node, farewell)
            self._changed(Change.LEFT, member.node)

    def _signed(self, alive: Alive) -> bool:
        content = alive_content(alive.node, alive.boot, alive.incarnation, alive.addresses)
        known = self.key_of(alive.node)
        if known in (None, alive.key) and self._signer.verify(
            alive.node, alive.key, alive.signature, content
        ):
            return True
        self._refused += 1
        return False

    def _signed_farewell(self, node: str, incarnation: int, signature: bytes) -> bool:
        key = self.key_of(node) or b""
        if self._signer.verify(node, key, signature, left_content(node, incarnation)):
            return True
        self._refused += 1
        return False

    def _spread(self, member: Member) -> None:
        self._news.add("member", member.node, member.alive())

    def _enter(self, member: Member) -> None:
        self._gone.pop(member.node, None)
        self._positions[member.node] = len(self.live)
        self.live.append(member.node)
        self.order.add(member.node)
        self.retransmits = self._tuning.retransmits(self.size)

    def _exit(self, member: Member) -> None:
        self._gone[member.node] = None
        index, last = self._positions.pop(member.node), self.live.pop()
        if last != member.node:
            self.live[index] = last
            self._positions[last] = index
        self.order.remove(member.node)
        self.retransmits = self._tuning.retransmits(self.size)
