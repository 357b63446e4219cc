"""Membership, records and elections as one state machine: bytes and a clock in, actions out.

The shell owns the socket, the clock (monotonic seconds) and the disk. It calls `handle_packet` for every
datagram decrypted by `sollold.cluster.net.packet_seal`, `tick` at `next_wake`, and executes the actions in
order.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

from sollold.cluster.gossip.actions import Action, Address, Change, NodeEvent, Persist, PersistedState
from sollold.cluster.gossip.anti_entropy import AntiEntropy
from sollold.cluster.gossip.awareness import Awareness
from sollold.cluster.gossip.broadcast_queue import BroadcastQueue
from sollold.cluster.gossip.config import LAN, Tuning
from sollold.cluster.gossip.join import Joins
from sollold.cluster.gossip.known import Known
from sollold.cluster.gossip.leadership import Leadership
from sollold.cluster.gossip.membership import Membership
from sollold.cluster.gossip.other_formats import OtherFormats
from sollold.cluster.gossip.outbox import Outbox
from sollold.cluster.gossip.own_state import OwnState
from sollold.cluster.gossip.packet import Rejected, decode, decode_push_pull
from sollold.cluster.gossip.packet_handler import PacketHandler
from sollold.cluster.gossip.probe import Prober
from sollold.cluster.gossip.push_pull import PushPullExchange
from sollold.cluster.gossip.record import Record
from sollold.cluster.gossip.records import Records
from sollold.cluster.gossip.registry import Merge, Registry
from sollold.cluster.gossip.signing import Signer
from sollold.cluster.gossip.term import Term
from sollold.cluster.gossip.timers import Timers


class Gossip:
    """One node's part in the cluster.

    The constructor is long because it creates all parts, which share the timers, the news and the actions.

    Args:
        record: this node's initial record; ``version`` and ``claim`` are set here.
        boot: positive integer below 2**63, greater than any earlier process' (see `double.boot_number`).
        addresses: addresses at which peers can reach this node, the best first; may be empty at first.
        kept: the state persisted by the last run; the default if there is none.
        now: monotonic seconds, as everywhere here.
        random: for the order of probes and the choice of peers.
        signer: signs this node's statements; the record's ``node`` is the id of its key.

    Attributes:
        known: read-only view of the cluster.
    """

    def __init__(
        self,
        record: Record,
        *,
        boot: int,
        addresses: tuple[Address, ...],
        kept: PersistedState,
        now: float,
        random: Random,
        signer: Signer,
        tuning: Tuning = LAN,
    ) -> None:
        self._me = record.node
        self._tuning = tuning
        self._timers = Timers()
        self._news = BroadcastQueue()
        self._actions: list[Action] = []
        self._awareness = Awareness(tuning.awareness_max)
        self._other_formats = OtherFormats()
        self._outbox = Outbox(
            record.node,
            boot,
            news=self._news,
            retransmits=lambda: self._membership.retransmits,
            actions=self._actions,
        )
        self._gossip_at: float | None = None
        self._gossiped = now - tuning.gossip_interval
        self._registry = Registry(
            replace(record, claim=Term()),
            boot,
            kept.version,
            signer=signer,
            key_of=lambda node: self._membership.key_of(node),
            highest=kept.term,
            barred=lambda node, boot: self._membership.barred(node, boot),
        )
        own = OwnState(
            record.node,
            boot,
            kept.incarnation + 1,
            addresses,
            news=self._news,
            awareness=self._awareness,
            signer=signer,
            changed=self._changed,
        )
        self._membership = Membership(
            own,
            random=random,
            tuning=tuning,
            timers=self._timers,
            news=self._news,
            signer=signer,
            changed=self._changed,
        )
        self._prober = Prober(
            self._membership,
            tuning=tuning,
            timers=self._timers,
            awareness=self._awareness,
            send=self._outbox.send,
            actions=self._actions,
            digest=lambda: self._anti_entropy.digest,
            sequence=random.getrandbits(32),
        )
        self._joins = Joins(
            self._membership,
            tuning=tuning,
            timers=self._timers,
            random=random,
            send=self._outbox.send_alone,
            sequence=self._prober.sequence,
            actions=self._actions,
        )
        self._exchange = PushPullExchange(self._membership, self._registry)
        self._leadership = Leadership(
            self._membership,
            self._registry,
            kept.term,
            now,
            tuning=tuning,
            timers=self._timers,
            persist=self._persist,
            elected=lambda term: self._actions.append(NodeEvent(Change.LEADER, term.leader, term)),
        )
        self._anti_entropy = AntiEntropy(
            self._membership,
            self._registry,
            tuning=tuning,
            timers=self._timers,
            random=random,
            actions=self._actions,
            now=now,
        )
        self._records = Records(
            self._membership,
            self._registry,
            self._leadership,
            self._anti_entropy,
            news=self._news,
            room=self._outbox.room,
            persist=self._persist,
            updated=lambda node: self._actions.append(NodeEvent(Change.UPDATED, node)),
        )
        self.known = Known(
            self._membership, self._registry, self._leadership, self._records, self._other_formats
        )
        self._handler = PacketHandler(
            self._membership,
            self._registry,
            self._prober,
            self._joins,
            self._anti_entropy,
            outbox=self._outbox,
            news=self._news,
            merged=self._records.merged,
        )
        self._kept = PersistedState()
        self._anti_entropy.note(self._me)
        self._membership.own.announce()
        self._records.publish()
        self._persist()
        self._prober.start(now + random.random() * tuning.probe_interval)
        self._timers.at(now + random.random() * tuning.reconnect_interval, self._reconnect)
        # The first tick is due at once: it returns the actions so far.
        self._timers.at(now, lambda now: None)

    def handle_packet(self, data: bytes, source: Address, now: float) -> list[Action]:
        """Handle a decrypted datagram. Invalid packets are counted in ``known.rejected`` and dropped."""
        self._awake(now)
        try:
            packet = decode(data)
        except Rejected:
            self._records.rejected += 1
            self._other_formats.note(data, source, now)
            return self._done(now)
        self._other_formats.understood(source)
        self._handler.handle(packet, source, now)
        return self._done(now)

    def tick(self, now: float) -> list[Action]:
        """Run due timers. Call it at `next_wake` or whenever convenient."""
        self._awake(now)
        self._timers.run(now)
        return self._done(now)

    def _awake(self, now: float) -> None:
        """If this process stood still, postpone its timers.

        Must come before anything else: timers set afterwards must not be postponed.
        """
        late = now - self._timers.next()
        if late > self._tuning.lag:
            self._timers.shift(late)
            self._membership.shift(late)
            self._awareness.worse()

    def next_wake(self) -> float:
        """Return when `tick` is due next; any other call may make it earlier."""
        return self._timers.next()

    def introduce(
        self, addresses: tuple[Address, ...], now: float, *, keep: bool = False, source: str = ""
    ) -> list[Action]:
        """Try ``addresses`` (of one machine), where a node may be: from mDNS, seeds or ``peers.json``.

        ``keep``: retry forever (with growing pauses) while no live node is known there. ``source``: a seed
        or a node id; its new addresses replace its former ones.
        """
        self._awake(now)
        self._joins.add(addresses, now, keep=keep, source=source)
        return self._done(now)

    def tcp_pong(self, sequence: int, now: float) -> list[Action]:
        """Handle the response to a `TcpPing`."""
        self._awake(now)
        self._prober.tcp_pong(sequence)
        return self._done(now)

    def link_made(self, node: str, address: Address, now: float) -> list[Action]:
        """Note that the standing link to ``node`` is up; ``address``: its IP and *gossip* port."""
        self._awake(now)
        self._handler.hear_link(node, address, now)
        return self._done(now)

    def link_lost(self, node: str, now: float, *, silent: bool = False) -> list[Action]:
        """Find out quickly whether ``node`` is dead: its standing link broke without goodbye.

        This takes less than a second if the other side's system closed it (end of file, reset): the link of a
        node that is merely slow stays open. ``silent``: our own system gave it up, since nothing was
        acknowledged; a bad network causes that too, so the decision may take about twice as long.
        """
        self._awake(now)
        self._prober.quick(node, now, silent=silent)
        return self._done(now)

    # Push-pull over TCP

    def push_pull_open(self) -> bytes:
        """Return the first body of an exchange, for the side that starts it."""
        return self._exchange.first_body()

    def push_pull(self, data: bytes, source: Address | None, now: float) -> tuple[bytes, list[Action]]:
        """Handle a received body. Returns the response (empty: none) and actions.

        ``source``: the peer's IP and gossip port, if known. An invalid body is counted and ends the exchange.
        """
        self._awake(now)
        try:
            body = decode_push_pull(data)
        except Rejected:
            self._records.rejected += 1
            self._other_formats.note(data, source, now)
            return b"", self._done(now)
        self._other_formats.understood(source)
        if body.sender == self._me:
            return b"", self._done(now)
        answer, merged = self._exchange.merge(body, now)
        for node, merge in merged:
            self._records.merged(node, merge)
            if merge is Merge.NEWER:
                self._records.pass_on(node)
        member = self._membership.members.get(body.sender)
        if member is not None and member.reached is None and member.boot == body.boot:
            member.reached = source
        return answer, self._done(now)

    def push_pull_done(self, node: str, ok: bool, now: float) -> list[Action]:
        """Handle the end of a `PushPullWith` for ``node``."""
        self._awake(now)
        if not ok and node:
            self._anti_entropy.failed(node, now)
        return self._done(now)

    # This node

    def persisted(self, kept: PersistedState, now: float) -> list[Action]:
        """Handle a completed `Persist`: make a claim that waited for it, unless a higher one was seen."""
        self._awake(now)
        claim = self._leadership.persisted(kept.term)
        if claim is not None:
            self._registry.update(replace(self._registry.me, claim=claim))
            self._records.own_changed()
        return self._done(now)

    def update_record(self, record: Record, now: float) -> list[Action]:
        """Change this node's record. ``version`` and ``claim`` of ``record`` are ignored."""
        self._awake(now)
        draining = self._registry.me.draining
        if self._registry.update(replace(record, claim=self._registry.me.claim)):
            self._records.own_changed()
            if draining != record.draining:
                self._leadership.due = True
        return self._done(now)

    def set_addresses(self, addresses: tuple[Address, ...], now: float) -> list[Action]:
        """Change this node's addresses."""
        self._awake(now)
        if addresses != self._membership.own.addresses:
            self._membership.own.move(addresses)
            self._anti_entropy.note(self._me)
        return self._done(now)

    def evict(self, nodes: frozenset[str], now: float) -> list[Action]:
        """Set the nodes evicted by an admin: they are declared dead at once and stay so."""
        self._awake(now)
        self._membership.evict(nodes, now)
        return self._done(now)

    def forget_others(self, now: float) -> list[Action]:
        """Forget all other nodes: this node changes to another cluster, where they are no members."""
        self._awake(now)
        self._membership.forget_others()
        self._membership.own.announce()
        self._records.publish()
        return self._done(now)

    def leave(self, now: float) -> list[Action]:
        """Announce that this node leaves. Keep ticking for half a second, so that it spreads, then stop."""
        self._awake(now)
        farewell = self._membership.own.leave()
        for member in self._membership.sample(8):
            if (address := member.address()) is not None:
                self._outbox.send(address, [farewell])
        return self._done(now)

    def _gossip_turn(self, now: float) -> None:
        self._gossip_at = None
        if len(self._news):
            self._gossiped = now
            for member in self._membership.sample(self._tuning.gossip_fanout):
                if (address := member.address()) is not None:
                    self._outbox.send_news(address)

    def _reconnect(self, now: float) -> None:
        """Forget nodes that are gone for good, and try another dead one."""
        self._timers.at(now + self._tuning.reconnect_interval, self._reconnect)
        self._membership.forget(now)
        self._registry.forget_all_but(self._membership.members)
        self._joins.try_dead()

    def _changed(self, change: Change, node: str) -> None:
        """Handle a change of the membership."""
        self._anti_entropy.note(node)
        if node == self._me:
            self._persist()
        elif change is Change.DOUBLED:
            self._registry.forget_barred(node)
        if change is not Change.SUSPECTED:
            self._leadership.due = True
        self._actions.append(NodeEvent(change, node))

    def _persist(self) -> None:
        kept = PersistedState(
            self._leadership.highest, self._registry.ceiling, self._membership.own.incarnation
        )
        if kept != self._kept:
            self._kept = kept
            self._actions.append(Persist(kept))

    def _done(self, now: float) -> list[Action]:
        if self._leadership.due:
            self._leadership.run(now)
            self._persist()
        if self._gossip_at is None and len(self._news) and self._membership.live:
            self._gossip_at = max(now, self._gossiped + self._tuning.gossip_interval)
            self._timers.at(self._gossip_at, self._gossip_turn)
        actions = self._actions[:]
        self._actions.clear()
        return actions
