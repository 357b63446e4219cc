"""Dispatches the messages of a received packet to the parts of the gossip core."""

from __future__ import annotations

from collections.abc import Callable

from sollold.cluster.gossip.actions import Address
from sollold.cluster.gossip.anti_entropy import AntiEntropy
from sollold.cluster.gossip.broadcast_queue import BroadcastQueue
from sollold.cluster.gossip.join import Joins
from sollold.cluster.gossip.membership import Membership
from sollold.cluster.gossip.outbox import Outbox
from sollold.cluster.gossip.packet import (
    Ack,
    Alive,
    Dead,
    Delta,
    Left,
    Nack,
    Packet,
    Ping,
    PingReq,
    Suspect,
    encode,
)
from sollold.cluster.gossip.probe import Prober
from sollold.cluster.gossip.registry import Merge, Registry


class PacketHandler:
    """Handles received packets.

    Args:
        merged: called with the result of merging a received record.
    """

    def __init__(
        self,
        membership: Membership,
        registry: Registry,
        prober: Prober,
        joins: Joins,
        anti_entropy: AntiEntropy,
        *,
        outbox: Outbox,
        news: BroadcastQueue,
        merged: Callable[[str, Merge], None],
    ) -> None:
        self._membership = membership
        self._registry = registry
        self._prober = prober
        self._joins = joins
        self._anti_entropy = anti_entropy
        self._outbox = outbox
        self._news = news
        self._merged = merged

    def handle(self, packet: Packet, source: Address, now: float) -> None:
        """Handle a packet received from ``source``."""
        membership, sender = self._membership, packet.sender
        if sender == membership.me:
            own = membership.own
            if packet.boot != own.boot and own.hear_double(packet.boot, source[0], now):
                self._outbox.send_alone(source, [membership.own.alive()])  # so that it knows as well
            return
        incarnation = membership.own.incarnation
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
                membership.hear_suspect(message.node, message.incarnation, message.by, now)
            elif isinstance(message, Dead):
                membership.hear_dead(message.node, message.incarnation, message.by, now)
            elif isinstance(message, PingReq):
                self._prober.hear_ping_request(message, source, now)
            elif isinstance(message, Nack):
                self._prober.hear_nack(sender, message.sequence)
            elif isinstance(message, Left):
                membership.hear_left(message.node, message.incarnation, message.signature, now)
        for delta in deltas:
            # After the rest: a new node's record comes together with its `Alive`.
            self._hear_delta(delta, sender, source, now)  # type: ignore[arg-type]
        if incarnation != membership.own.incarnation:
            # Send the refutation to the accuser first.
            self._outbox.send(source, [membership.own.alive()])
        self._contact(sender, packet.boot, source, now)

    def hear_link(self, node: str, address: Address, now: float) -> None:
        """Handle a standing link to ``node``, made at ``address``."""
        self._prober.hear_link(node)
        member = self._membership.members.get(node)
        if member is None:
            self._anti_entropy.want(node, (address,), now)
        elif not member.live:
            self._outbox.send(address, member.state())
        elif member.reached is None:
            member.reached = address

    def _greeting(self, sender: str) -> list[bytes]:
        """Return our `Alive` if the sender may not know us, because we did not know it as alive until now."""
        member = self._membership.members.get(sender)
        return [] if member is not None and member.live and member.reached else [self._membership.own.alive()]

    def _contact(self, sender: str, boot: int, source: Address, now: float) -> None:
        """Note the address of ``sender``, or send it the wrong state recorded of it."""
        member = self._membership.members.get(sender)
        if member is None:
            self._anti_entropy.want(sender, (source,), now)
        elif member.boot != boot or not member.live:
            if member.live:
                self._membership.hear_other(member, boot, source, now)
            self._outbox.send(source, member.state())
        else:
            member.reached, member.heard = source, now

    def _hear_alive(self, sender: str, alive: Alive, source: Address, now: float) -> None:
        members = self._membership.members
        member = members.get(alive.node)
        was_gone = member is not None and not member.live
        self._membership.hear_alive(alive, now)
        if member is not None and member.live and member.processes.tells(alive.boot, now):
            address = member.address()
            if address is not None:
                self._outbox.send(address, [encode(alive)])
        if was_gone and alive.node == sender and members[sender].live:
            # The other side of a healed partition has news of further nodes.
            self._anti_entropy.want(sender, (source,), now)

    def _hear_ack(self, sender: str, ack: Ack, source: Address, now: float) -> None:
        self._joins.hear_ack(sender, ack.sequence, source)
        if self._prober.hear_ack(sender, ack, now):
            self._anti_entropy.compare(sender, ack.digest, now)

    def _hear_delta(self, delta: Delta, sender: str, source: Address, now: float) -> None:
        if delta.node != self._membership.me and delta.node not in self._membership.members:
            return
        merge = self._registry.merge_delta(delta)
        self._merged(delta.node, merge)
        if merge is Merge.NEWER:
            self._news.add("record", delta.node, encode(delta))
        elif merge is Merge.BEHIND:
            self._anti_entropy.want(sender, (source,), now)
