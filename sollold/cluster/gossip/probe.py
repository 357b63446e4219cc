"""Detects nodes that do not respond: ping; then indirect pings, other addresses and TCP; then a verdict.

SWIM's probe with Lifeguard's nacks: a node asked to ping for us reports even if it got no response;
if these nacks are missing too, the fault is probably ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sollold.cluster.gossip.actions import Action, Address, TcpPing
from sollold.cluster.gossip.awareness import Awareness
from sollold.cluster.gossip.config import Tuning
from sollold.cluster.gossip.member import Member, Status, literal
from sollold.cluster.gossip.membership import Membership
from sollold.cluster.gossip.packet import Ack, Addresses, Nack, Ping, PingReq, Suspect, encode
from sollold.cluster.gossip.timers import Timer, Timers

_MAX_RELAYED = 1024
"""Maximum pings in progress on behalf of others."""
_OVERDUE_INTERVALS = 5.0
"""Probe intervals for which an ack after the verdict is still recognised as late."""
_NACK_SHARE = 0.8
"""Share of the timeout after which a nack is sent, so that it arrives before the verdict there."""


class _Probe:
    __slots__ = ("began", "node", "quick", "relays", "silent", "timers")

    def __init__(self, node: str, began: float, quick: bool) -> None:
        self.node = node
        self.began = began
        self.quick = quick
        self.relays: tuple[str, ...] = ()
        self.silent: set[str] = set()
        """Relays that have not even sent a nack."""
        self.timers: list[Timer] = []
        """Later steps of this probe, cancelled when it is closed."""


class Prober:
    """Probes the members in turn.

    Args:
        send: sends encoded messages to an address, with news if there is room.
        actions: the list that `TcpPing` is appended to.
        digest: returns the digest of all this node knows; sent with every ack.
    """

    def __init__(
        self,
        membership: Membership,
        *,
        tuning: Tuning,
        timers: Timers,
        awareness: Awareness,
        send: Callable[[Address, list[bytes]], None],
        actions: list[Action],
        digest: Callable[[], int],
        sequence: int,
    ) -> None:
        self._membership = membership
        self._tuning = tuning
        self._timers = timers
        self._awareness = awareness
        self._send = send
        self._actions = actions
        self._digest = digest
        self._sequence = sequence
        self._probes: dict[int, _Probe] = {}
        self._probed: dict[str, int] = {}
        self._overdue: dict[int, str] = {}
        self._relayed: dict[int, tuple[str, Address, int]] = {}

    def sequence(self) -> int:
        """Return a sequence number for a ping; it wraps around."""
        self._sequence = self._sequence + 1 & 0xFFFFFFFF
        return self._sequence

    def start(self, now: float) -> None:
        """Start to ping the members in turn."""
        self._timers.at(now, self._turn)

    def _turn(self, now: float) -> None:
        pause = self._tuning.probe_interval / self._tuning.probes
        self._timers.at(now + self._awareness.stretch(pause), self._turn)
        if self._membership.own.leaving:
            return
        members, probed = self._membership.members, self._probed
        node = self._membership.order.next(
            lambda node: node not in probed and now - members[node].heard >= pause
        )
        if node is not None and node not in probed:
            self._probe(members[node], now)

    def _open(self, node: str, now: float, *, quick: bool) -> int:
        sequence = self.sequence()
        self._probes[sequence] = _Probe(node, now, quick)
        self._probed[node] = sequence
        return sequence

    def _close(self, sequence: int) -> None:
        probe = self._probes.pop(sequence, None)
        if probe is None:
            return
        for timer in probe.timers:
            timer.cancel()
        if self._probed.get(probe.node) == sequence:
            del self._probed[probe.node]

    def _schedule(self, when: float, call: Callable[..., None], sequence: int, *args: Any) -> None:
        """Schedule ``call(sequence, *args, now)`` at ``when``, unless the probe is closed before."""
        self._probes[sequence].timers.append(self._timers.at(when, call, sequence, *args))

    def _probe(self, member: Member, now: float) -> None:
        sequence = self._open(member.node, now, quick=False)
        address = member.address()
        if address is not None:
            self._send(address, self._ping(sequence, member))
        stretch = self._awareness.stretch(1.0 + member.late)
        self._schedule(now + stretch * self._tuning.probe_timeout, self._indirect, sequence)
        self._schedule(now + stretch * self._tuning.probe_interval, self._verdict, sequence)

    def _ping(self, sequence: int, member: Member) -> list[bytes]:
        """Return a ping; for a suspect it is preceded by the suspicion, so that the node refutes it."""
        ping = encode(Ping(sequence, member.node))
        if member.status is Status.SUSPECT:
            return [encode(Suspect(member.node, member.incarnation, self._membership.me)), ping]
        return [ping]

    def _indirect(self, sequence: int, now: float) -> None:
        probe = self._probes[sequence]
        member = self._membership.members.get(probe.node)
        if member is None:
            return
        member.unanswered += 1
        relays = self._membership.sample(self._tuning.indirect_probes, without=probe.node)
        probe.relays = tuple(relay.node for relay in relays)
        probe.silent = set(probe.relays)
        ask = encode(PingReq(sequence, member.node, member.everywhere()[:4]))
        for relay in relays:
            address = relay.address()
            if address is not None:
                self._send(address, [ask])
        for address in member.everywhere()[1:4]:
            self._send(address, self._ping(sequence, member))
        timeout = self._tuning.probe_interval - self._tuning.probe_timeout
        timeout *= self._awareness.stretch(1.0 + member.late)
        self._actions.append(TcpPing(member.node, member.everywhere(), sequence, timeout))

    def _verdict(self, sequence: int, now: float) -> None:
        probe = self._probes[sequence]
        self._close(sequence)
        self._overdue[sequence] = probe.node
        self._timers.at(now + _OVERDUE_INTERVALS * self._tuning.probe_interval, self._lost, sequence)
        self._awareness.worse(len(probe.silent) if probe.relays else 1)
        self._membership.suspect(probe.node, now)

    def _lost(self, sequence: int, now: float) -> None:
        self._overdue.pop(sequence, None)

    # After a broken connection

    def quick(self, node: str, now: float, *, silent: bool) -> None:
        """Ping ``node`` on all paths at once after a broken connection, and decide quickly.

        ``silent``: see `Gossip.link_lost`. A node known to respond late has more time.
        """
        member = self._membership.members.get(node)
        if member is None or not member.live:
            return
        sequence = self._probed.get(node)
        if sequence is not None:
            if self._probes[sequence].quick:
                return
            self._close(sequence)
        sequence = self._open(node, now, quick=True)
        self._ping_paths(sequence, now)
        self._indirect(sequence, now)
        tuning = self._tuning
        stretch = self._awareness.stretch(1.0 + member.late)
        timeout = stretch * (tuning.silent_probe if silent else tuning.quick_probe)
        suspicion = stretch * (tuning.silent_suspicion if silent else tuning.quick_suspicion)
        self._schedule(now + timeout / 2, self._ping_paths, sequence)
        self._schedule(now + timeout, self._quick_verdict, sequence, suspicion)

    def _ping_paths(self, sequence: int, now: float) -> None:
        probe = self._probes.get(sequence)
        member = self._membership.members.get(probe.node) if probe is not None else None
        if member is not None and member.live:
            for address in member.everywhere():
                self._send(address, self._ping(sequence, member))

    def _quick_verdict(self, sequence: int, seconds: float, now: float) -> None:
        probe = self._probes[sequence]
        self._membership.suspect(probe.node, now, within=seconds)
        # Last attempts, which carry the suspicion. An ack even to an earlier one shows that the process
        # outlived its connection: then the suspicion is treated like any other.
        self._ping_paths(sequence, now)
        self._schedule(now + seconds / 2, self._ping_paths, sequence)
        self._schedule(now + seconds, self._forget, sequence)

    def _forget(self, sequence: int, now: float) -> None:
        self._close(sequence)

    # Received messages

    def hear_ping(self, ping: Ping, source: Address, greeting: list[bytes]) -> None:
        """Respond to a ping, unless it is for another node that had this address."""
        if ping.node in ("", self._membership.me):
            self._send(source, [*greeting, encode(Ack(ping.sequence, self._digest()))])

    def hear_ping_request(self, ask: PingReq, source: Address, now: float) -> None:
        """Ping a node on behalf of another node that got no response from it."""
        if ask.node == self._membership.me:
            self._send(source, [encode(Ack(ask.sequence, self._digest()))])
            return
        if len(self._relayed) >= _MAX_RELAYED:
            return
        sequence = self.sequence()
        self._relayed[sequence] = (ask.node, source, ask.sequence)
        member = self._membership.members.get(ask.node)
        own: Addresses = member.everywhere()[:1] if member is not None else ()
        for address in dict.fromkeys(own + literal(ask.addresses[:2])):
            self._send(address, [encode(Ping(sequence, ask.node))])
        timeout = self._tuning.probe_interval - self._tuning.probe_timeout
        self._timers.at(now + timeout * _NACK_SHARE, self._unheard, sequence)

    def _unheard(self, sequence: int, now: float) -> None:
        relayed = self._relayed.pop(sequence, None)
        if relayed is not None:
            self._send(relayed[1], [encode(Nack(relayed[2]))])

    def hear_ack(self, sender: str, ack: Ack, now: float) -> bool:
        """Handle an ack. True if ``sender`` itself responded to a probe of ours.

        A node that responds after the verdict is slow, not dead: it gets more time from now on, and less
        again once it is quick. (In Lifeguard only the prober's own slowness stretches timeouts.)
        """
        member = self._membership.members.get(sender)
        if member is not None:
            member.unanswered = 0
        probe = self._probes.get(ack.sequence)
        if probe is not None:
            if sender != probe.node and sender not in probe.relays:
                return False
            self._close(ack.sequence)
            if probe.quick:
                self._membership.relax(probe.node)
            else:
                self._awareness.better()
            if sender != probe.node:
                return False
            if member is not None and now - probe.began < self._tuning.probe_timeout:
                member.quickened()
            return True
        if self._overdue.get(ack.sequence) == sender:
            del self._overdue[ack.sequence]
            if member is not None:
                member.slowed()
            return False
        relayed = self._relayed.get(ack.sequence)
        if relayed is not None and relayed[0] == sender:
            del self._relayed[ack.sequence]
            self._send(relayed[1], [encode(Ack(relayed[2], 0))])
        return False

    def hear_nack(self, sender: str, sequence: int) -> None:
        """Handle a nack: the relay is alive, though it got no response."""
        probe = self._probes.get(sequence)
        if probe is not None:
            probe.silent.discard(sender)

    def tcp_pong(self, sequence: int) -> None:
        """Close the probe: the node responded over TCP."""
        probe = self._probes.get(sequence)
        if probe is not None and probe.quick:
            self._membership.relax(probe.node)
        self._close(sequence)

    def hear_link(self, node: str) -> None:
        """Close any probe of ``node``: a connection with it was made, so it is alive."""
        sequence = self._probed.get(node)
        if sequence is not None:
            self._close(sequence)
