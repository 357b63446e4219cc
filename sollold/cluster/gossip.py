"""Membership, records and election as one state machine: bytes and a clock in, actions out.

The shell owns the socket, the clock (monotonic seconds) and the disk. It calls `handle_packet` for every
datagram opened by `sollold.cluster.seal`, `tick` at `next_wake`, and carries out the actions in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from random import Random

from sollold.cluster.actions import (
    Action,
    Address,
    Change,
    Event,
    Kept,
    Persist,
    Send,
)
from sollold.cluster.awareness import Awareness
from sollold.cluster.broadcast import News
from sollold.cluster.catch_up import CatchUp
from sollold.cluster.election import Election, Standing
from sollold.cluster.exchange import Exchange
from sollold.cluster.introduction import Introductions
from sollold.cluster.membership import Membership
from sollold.cluster.packet import (
    Ack,
    Alive,
    Dead,
    Delta,
    Left,
    Nack,
    Ping,
    PingReq,
    Rejected,
    Suspect,
    compound,
    decode,
    decode_push_pull,
    encode,
    head,
    room,
)
from sollold.cluster.probe import Prober
from sollold.cluster.record import Record
from sollold.cluster.registry import Merge, Registry
from sollold.cluster.term import Term
from sollold.cluster.timers import Timers
from sollold.cluster.tuning import LAN, Tuning


class Gossip:
    """One node's part in the cluster.

    Args:
        record: what this node says of itself at first; ``version`` and ``claim`` are set here.
        boot: random positive integer below 2**63, new with every start of the process.
        addresses: where peers can reach this node, the best first; may be empty at first.
        kept: what the last run wrote with `Persist`; the default when there is nothing.
        now: monotonic seconds, as everywhere here.
        random: for the order of probes and the choice of peers.
    """

    def __init__(
        self,
        record: Record,
        *,
        boot: int,
        addresses: tuple[Address, ...],
        kept: Kept,
        now: float,
        random: Random,
        tuning: Tuning = LAN,
    ) -> None:
        self._me = record.node
        self._boot = boot
        self._random = random
        self._tuning = tuning
        self._timers = Timers()
        self._news = News()
        self._actions: list[Action] = []
        self._awareness = Awareness(tuning.awareness_max)
        self._rejected = 0
        self._head = head(record.node, boot)
        self._room = room(self._head)
        self._gossip_at: float | None = None
        self._gossiped = now - tuning.gossip_interval
        self._registry = Registry(replace(record, claim=Term()), boot, kept.version)
        self._membership = Membership(
            record.node,
            boot,
            kept.incarnation + 1,
            addresses,
            random=random,
            tuning=tuning,
            timers=self._timers,
            news=self._news,
            awareness=self._awareness,
            changed=self._changed,
        )
        self._prober = Prober(
            self._membership,
            tuning=tuning,
            timers=self._timers,
            awareness=self._awareness,
            send=self._send,
            actions=self._actions,
            digest=lambda: self._catch_up.digest,
            sequence=random.getrandbits(32),
        )
        self._introductions = Introductions(
            self._membership,
            tuning=tuning,
            timers=self._timers,
            random=random,
            send=partial(self._send, news=False),
            sequence=self._prober.sequence,
            actions=self._actions,
        )
        self._exchange = Exchange(self._membership, self._registry)
        self._election = Election(record.node, kept.term, now, tuning)
        self._term = Term()
        self._election_due = True
        self._decide_at = float("inf")
        self._claiming: Term | None = None
        """The claim that is on its way to the disk; nobody is told of it before."""
        self._catch_up = CatchUp(
            self._membership,
            self._registry,
            tuning=tuning,
            timers=self._timers,
            random=random,
            actions=self._actions,
            now=now,
        )
        self._kept = Kept()
        self._catch_up.note(self._me)
        self._membership.announce()
        self._say_record()
        self._persist()
        self._prober.start(now + random.random() * tuning.probe_interval)
        self._timers.at(now + random.random() * tuning.reconnect_interval, self._reconnect)
        self._timers.at(now, self._nothing)

    # What comes in

    def handle_packet(self, data: bytes, source: Address, now: float) -> list[Action]:
        """A datagram, already opened. What is not a packet is counted in ``rejected`` and dropped."""
        self._awake(now)
        try:
            packet = decode(data)
        except Rejected:
            self._rejected += 1
            return self._done(now)
        sender = packet.sender
        if sender == self._me:
            if packet.boot != self._boot and self._membership.hear_double(now):
                self._send(source, [self._membership.my_alive()], news=False)  # so that it knows as well
            return self._done(now)
        incarnation = self._membership.incarnation
        deltas = []
        for message in packet.messages:
            kind = type(message)
            if kind is Ping:
                self._prober.hear_ping(message, source, self._greeting(sender))  # type: ignore[arg-type]
            elif kind is Ack:
                self._hear_ack(sender, message, source, now)  # type: ignore[arg-type]
            elif kind is Alive:
                self._hear_alive(sender, message, source, now)  # type: ignore[arg-type]
            elif kind is Delta:
                deltas.append(message)
            elif isinstance(message, Suspect):
                self._membership.hear_suspect(message.node, message.incarnation, message.by, now)
            elif isinstance(message, Dead):
                self._membership.hear_dead(message.node, message.incarnation, message.by, now)
            elif isinstance(message, PingReq):
                self._prober.hear_ping_request(message, source, now)
            elif isinstance(message, Nack):
                self._prober.hear_nack(sender, message.sequence)
            elif isinstance(message, Left):
                self._membership.hear_left(message.node, message.incarnation, now)
        for delta in deltas:
            # After the rest: a newcomer's record comes with the word that it lives.
            self._hear_delta(delta, sender, source, now)  # type: ignore[arg-type]
        if incarnation != self._membership.incarnation:
            # Whoever accused hears the refutation first.
            self._send(source, [self._membership.my_alive()])
        self._contact(sender, packet.boot, source, now)
        return self._done(now)

    def tick(self, now: float) -> list[Action]:
        """Do what is due. Called at `next_wake` or whenever convenient."""
        self._awake(now)
        self._timers.run(now)
        return self._done(now)

    def _awake(self, now: float) -> None:
        """If this process stood still, move its timers on. Before anything else that happens after it, or
        what is set then would be moved as well."""
        late = now - self._timers.next()
        if late > self._tuning.lag:
            self._timers.shift(late)
            self._membership.shift(late)
            self._awareness.worse()

    def next_wake(self) -> float:
        """When `tick` has something to do next; may move closer after any other call."""
        return self._timers.next()

    def introduce(
        self, addresses: tuple[Address, ...], now: float, *, keep: bool = False, source: str = ""
    ) -> list[Action]:
        """Somebody may be at one of ``addresses`` (one machine's): from mDNS, seeds or memory.

        ``keep``: try again for ever (with growing pauses) while no live node is known there. ``source``: a
        seed or a node id; what it says replaces what it said before.
        """
        self._awake(now)
        self._introductions.add(addresses, now, keep=keep, source=source)
        return self._done(now)

    def tcp_pong(self, sequence: int, now: float) -> list[Action]:
        """The node of a `TcpPing` answered."""
        self._awake(now)
        self._prober.tcp_pong(sequence)
        return self._done(now)

    def link_made(self, node: str, address: Address, now: float) -> list[Action]:
        """The standing link to ``node`` is up; ``address`` is its IP and *gossip* port."""
        self._awake(now)
        self._prober.hear_link(node)
        member = self._membership.members.get(node)
        if member is None:
            self._catch_up.want(node, (address,), now)
        elif not member.live:
            self._send(address, [member.said()])
        elif member.reached is None:
            member.reached = address
        return self._done(now)

    def link_lost(self, node: str, now: float, *, silent: bool = False) -> list[Action]:
        """The standing link broke without goodbye: find out soon whether ``node`` is dead.

        Within a second where the other side's system ended it (end of file, reset): the link of a node that
        is merely slow stays open. ``silent``: this side's system gave it up, since nothing was acknowledged;
        that is so for a bad network too, so the answer may take about twice as long.
        """
        self._awake(now)
        self._prober.quick(node, now, silent=silent)
        return self._done(now)

    # Push-pull over TCP

    def push_pull_open(self) -> bytes:
        """The first body of an exchange, for who begins it."""
        return self._exchange.open()

    def push_pull(self, data: bytes, source: Address | None, now: float) -> tuple[bytes, list[Action]]:
        """A body from the other side → what to send back (empty: nothing more), and actions.

        ``source``: the peer's IP and gossip port, when known. A body that is no push-pull is counted and
        ends the exchange.
        """
        self._awake(now)
        try:
            body = decode_push_pull(data)
        except Rejected:
            self._rejected += 1
            return b"", self._done(now)
        if body.sender == self._me:
            return b"", self._done(now)
        answer, merged = self._exchange.take(body, now)
        for node, merge in merged:
            self._merged(node, merge)
            if merge is Merge.NEWER:
                self._news.add("record", node, self._registry.delta_of(node, self._room))
        member = self._membership.members.get(body.sender)
        if member is not None and member.reached is None and member.boot == body.boot:
            member.reached = source
        return answer, self._done(now)

    def push_pull_done(self, node: str, ok: bool, now: float) -> list[Action]:
        """A `PushPullWith` for ``node`` ended."""
        self._awake(now)
        if not ok and node:
            self._catch_up.failed(node, now)
        return self._done(now)

    # What this node does

    def persisted(self, kept: Kept, now: float) -> list[Action]:
        """A `Persist` was carried out: a claim that waited for it is made, unless a higher one came."""
        self._awake(now)
        claim = self._claiming
        if claim is not None and kept.term >= claim:
            self._claiming = None
            if claim == self._election.highest and not self._membership.leaving:
                self._registry.update(replace(self._registry.me, claim=claim))
                self._own_changed()
            self._election_due = True
        return self._done(now)

    def update_record(self, record: Record, now: float) -> list[Action]:
        """Say something new of this node. ``version`` and ``claim`` of ``record`` are ignored."""
        self._awake(now)
        draining = self._registry.me.draining
        if self._registry.update(replace(record, claim=self._registry.me.claim)):
            self._own_changed()
            if draining != record.draining:
                self._election_due = True
        return self._done(now)

    def set_addresses(self, addresses: tuple[Address, ...], now: float) -> list[Action]:
        """This node's own addresses changed."""
        self._awake(now)
        if addresses != self._membership.addresses:
            self._membership.move(addresses)
            self._catch_up.note(self._me)
        return self._done(now)

    def observe_term(self, term: Term, now: float) -> list[Action]:
        """A term was seen outside of records (an owner refused ours as old): never claim below it."""
        self._awake(now)
        if self._election.observe(term):
            self._election_due = True
        return self._done(now)

    def leave(self, now: float) -> list[Action]:
        """Say goodbye. Tick on for half a second, so that it spreads, then stop."""
        self._awake(now)
        farewell = self._membership.leave()
        for member in self._membership.sample(8):
            address = member.address()
            if address is not None:
                self._send(address, [farewell])
        return self._done(now)

    # What is known

    @property
    def me(self) -> Record:
        """This node's record, with its version and claim."""
        return self._registry.me

    @property
    def rejected(self) -> int:
        """Packets and push-pull bodies that were not understood."""
        return self._rejected

    @property
    def health(self) -> int:
        """0: this node keeps up; up to 7: its probes fail, its time-outs are stretched."""
        return self._awareness.score

    def leader(self) -> Term:
        """The term that holds; ``leader`` is empty while there is none."""
        return self._term

    def live(self) -> tuple[Record, ...]:
        """Records of the live nodes, this one included, by node id. Without those whose record is due."""
        registers = map(self._registry.get, sorted([self._me, *self._membership.live]))
        return tuple(register.record for register in registers if register is not None)

    def record(self, node: str) -> Record | None:
        """The last record of ``node``, alive or not."""
        register = self._registry.get(node)
        return register.record if register is not None else None

    def alive(self, node: str) -> bool:
        """Whether ``node`` is held alive (suspected ones are)."""
        member = self._membership.members.get(node)
        return node == self._me or (member is not None and member.live)

    def addresses(self, node: str) -> tuple[Address, ...]:
        """Where to reach ``node``: the address it really reached us at first. Empty: unknown."""
        member = self._membership.members.get(node)
        return member.everywhere() if member is not None else ()

    def boot(self, node: str) -> int:
        """The boot id of ``node``; 0 when unknown."""
        member = self._membership.members.get(node)
        return member.boot if member is not None else 0

    def contacts(self) -> tuple[tuple[str, tuple[Address, ...]], ...]:
        """Every other node held alive with its addresses: what to remember on disk."""
        return tuple((node, self.addresses(node)) for node in sorted(self._membership.live))

    # Packets

    def _send(self, address: Address, messages: list[bytes], *, news: bool = True) -> None:
        """``news``: with as much of it as there is room for; False where perhaps nobody hears it, since each
        piece is sent so many times and no more."""
        space = self._room
        for message in messages:
            space -= len(message)
        if news and len(self._news):
            messages = messages + self._news.take(space, self._membership.retransmits)
        self._actions.append(Send(address, compound(self._head, messages)))

    def _greeting(self, sender: str) -> list[bytes]:
        """What goes before an answer to somebody who may not know us: we did not know it live until now."""
        member = self._membership.members.get(sender)
        return [] if member is not None and member.live and member.reached else [self._membership.my_alive()]

    def _contact(self, sender: str, boot: int, source: Address, now: float) -> None:
        """A packet came from ``sender``: note where from, or tell it what is wrongly held of it."""
        member = self._membership.members.get(sender)
        if member is None:
            self._catch_up.want(sender, (source,), now)
        elif member.boot != boot or not member.live:
            self._send(source, [member.said()])
        else:
            member.reached = source

    def _hear_alive(self, sender: str, said: Alive, source: Address, now: float) -> None:
        members = self._membership.members
        member = members.get(said.node)
        was_gone = member is not None and not member.live
        self._membership.hear_alive(said, now)
        if was_gone and said.node == sender and members[sender].live:
            # The other side of a healed partition has news of more than itself.
            self._catch_up.want(sender, (source,), now)

    def _hear_ack(self, sender: str, ack: Ack, source: Address, now: float) -> None:
        self._introductions.hear_ack(sender, ack.sequence, source)
        if self._prober.hear_ack(sender, ack, now):
            self._catch_up.compare(sender, ack.digest, now)

    def _gossip_turn(self, now: float) -> None:
        self._gossip_at = None
        if not len(self._news):
            return
        self._gossiped = now
        for member in self._membership.sample(self._tuning.gossip_fanout):
            address = member.address()
            messages = self._news.take(self._room, self._membership.retransmits)
            if messages and address is not None:
                self._actions.append(Send(address, compound(self._head, messages)))

    def _reconnect(self, now: float) -> None:
        """Try one that was found dead: it may live behind a partition that has healed."""
        self._timers.at(now + self._tuning.reconnect_interval, self._reconnect)
        self._membership.forget(now)
        self._registry.forget_all_but(self._membership.members)
        dead = [member for member in self._membership.members.values() if not member.live]
        if dead and not self._membership.leaving:
            member = self._random.choice(dead)
            for address in member.everywhere()[:4]:
                ping = encode(Ping(self._prober.sequence(), member.node))
                self._send(address, [self._membership.my_alive(), member.said(), ping], news=False)

    # Records

    def _say_record(self) -> None:
        self._news.add("record", self._me, self._registry.delta(self._room, self._room // 3))

    def _own_changed(self) -> None:
        self._say_record()
        self._catch_up.note(self._me)
        self._persist()
        self._tell(Change.UPDATED, self._me)

    def _hear_delta(self, delta: Delta, sender: str, source: Address, now: float) -> None:
        if delta.node != self._me and delta.node not in self._membership.members:
            return
        merge = self._registry.merge_delta(delta)
        self._merged(delta.node, merge)
        if merge is Merge.NEWER:
            self._news.add("record", delta.node, encode(delta))
        elif merge is Merge.BEHIND:
            self._catch_up.want(sender, (source,), now)

    def _merged(self, node: str, merge: Merge) -> None:
        if merge is Merge.NEWER:
            self._catch_up.note(node)
            if self._registry.stirred:
                self._registry.stirred = False
                self._election.observe(self._registry.highest)
                self._election_due = True
            self._tell(Change.UPDATED, node)
        elif merge is Merge.RAISED:
            self._own_changed()
        elif merge is Merge.BROKEN:
            self._rejected += 1

    # Changes

    def _tell(self, change: Change, node: str, term: Term | None = None) -> None:
        self._actions.append(Event(change, node, term or Term()))

    def _changed(self, change: Change, node: str) -> None:
        """The membership changed."""
        self._catch_up.note(node)
        if node == self._me:
            self._persist()
        if change is not Change.SUSPECTED:
            self._election_due = True
        self._tell(change, node)

    def _standings(self) -> Iterator[Standing]:
        for node in (self._me, *self._membership.live):
            register = self._registry.get(node)
            if register is None:
                yield Standing(node, None, False)
            else:
                yield Standing(node, register.record.claim, register.record.draining)

    def _elect(self, now: float) -> None:
        self._election_due = False
        if self._membership.leaving:
            return
        if self._claiming is not None and self._claiming == self._election.highest:
            return
        verdict = self._election.decide(self._standings(), now)
        if verdict.claim:
            self._claiming = verdict.term
            self._persist()
            return
        if verdict.again < float("inf") and verdict.again != self._decide_at:
            self._decide_at = verdict.again
            self._timers.at(verdict.again, self._decide)
        if verdict.term != self._term:
            self._term = verdict.term
            self._tell(Change.LEADER, verdict.term.leader, verdict.term)

    def _decide(self, now: float) -> None:
        self._decide_at = float("inf")
        self._election_due = True

    def _persist(self) -> None:
        kept = Kept(self._election.highest, self._registry.ceiling, self._membership.incarnation)
        if kept != self._kept:
            self._kept = kept
            self._actions.append(Persist(kept))

    def _nothing(self, now: float) -> None:
        """So that the first tick is due at once, with what the construction wants."""

    def _done(self, now: float) -> list[Action]:
        if self._election_due:
            self._elect(now)
            self._persist()
        if self._gossip_at is None and len(self._news) and self._membership.live:
            self._gossip_at = max(now, self._gossiped + self._tuning.gossip_interval)
            self._timers.at(self._gossip_at, self._gossip_turn)
        actions = self._actions[:]
        self._actions.clear()
        return actions
