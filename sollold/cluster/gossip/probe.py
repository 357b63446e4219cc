"""Finds out who does not answer: ping; indirect pings, other addresses and TCP; then a verdict.

SWIM's probe with Lifeguard's nacks: a node asked to ping for us says so even if it heard nothing;
when these nacks are missing too, the fault is likely ours.
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

_RELAYED = 1024
"""Pings for others under way at most."""
_OVERDUE = 5.0
"""Probe intervals in which a late ack is still told from a stray one."""
_NACK_AT = 0.8
"""Share of the time-out after which a nack is sent, so that it is there before the asker's verdict."""


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
        """What else is done for this probe; nothing once it is closed."""


class Prober:
    """Probes the members in turn.

    Args:
        send: sends encoded messages to an address, with news if there is room.
        actions: where `TcpPing` goes.
        digest: of all this node knows; goes with every ack.
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
        """A number for a ping, not used for long."""
        self._sequence = self._sequence + 1 & 0xFFFFFFFF
        return self._sequence

    def start(self, now: float) -> None:
        """Begin to ping the members in turn."""
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

    def _then(self, when: float, call: Callable[..., None], sequence: int, *args: Any) -> None:
        """``call(sequence, *args, now)`` at ``when``, unless the probe is closed by then."""
        self._probes[sequence].timers.append(self._timers.at(when, call, sequence, *args))

    def _probe(self, member: Member, now: float) -> None:
        sequence = self._open(member.node, now, quick=False)
        address = member.address()
        if address is not None:
            self._send(address, self._ping(sequence, member))
        stretch = self._awareness.stretch(1.0 + member.late)
        self._then(now + stretch * self._tuning.probe_timeout, self._indirect, sequence)
        self._then(now + stretch * self._tuning.probe_interval, self._verdict, sequence)

    def _ping(self, sequence: int, member: Member) -> list[bytes]:
        """A ping; to a suspect it carries the suspicion, before it, so that the ack refutes it."""
        ping = encode(Ping(sequence, member.node))
        if member.status is Status.SUSPECT:
            return [encode(Suspect(member.node, member.incarnation, self._membership.me)), ping]
        return [ping]

    def _indirect(self, sequence: int, now: float) -> None:
        probe = self._probes[sequence]
        member = self._membership.members.get(probe.node)
        if member is None:
            return
        relays = self._membership.sample(self._tuning.indirect_probes, without=probe.node)
        probe.relays = tuple(relay.node for relay in relays)
        probe.silent = set(probe.relays)
        ask = encode(PingReq(sequence, member.node, _few(member)))
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
        self._timers.at(now + _OVERDUE * self._tuning.probe_interval, self._lost, sequence)
        self._awareness.worse(len(probe.silent) if probe.relays else 1)
        self._membership.suspect(probe.node, now)

    def _lost(self, sequence: int, now: float) -> None:
        self._overdue.pop(sequence, None)

    # After a broken connection

    def quick(self, node: str, now: float, *, silent: bool) -> None:
        """The connection to ``node`` broke: ping it on all ways at once, and decide quickly.

        ``silent``: see `Gossip.link_lost`. A node known to answer late has more time.
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
        self._again(sequence, now)
        self._indirect(sequence, now)
        tuning = self._tuning
        stretch = self._awareness.stretch(1.0 + member.late)
        within = stretch * (tuning.silent_probe if silent else tuning.quick_probe)
        suspected = stretch * (tuning.silent_suspicion if silent else tuning.quick_suspicion)
        self._then(now + within / 2, self._again, sequence)
        self._then(now + within, self._quick_verdict, sequence, suspected)

    def _again(self, sequence: int, now: float) -> None:
        probe = self._probes.get(sequence)
        member = self._membership.members.get(probe.node) if probe is not None else None
        if member is not None and member.live:
            for address in member.everywhere():
                self._send(address, self._ping(sequence, member))

    def _quick_verdict(self, sequence: int, within: float, now: float) -> None:
        probe = self._probes[sequence]
        self._membership.suspect(probe.node, now, within=within)
        # Last tries, which tell it of the suspicion. An answer even to an earlier one shows that the process
        # outlived its link: then the suspicion is one like any other.
        self._again(sequence, now)
        self._then(now + within / 2, self._again, sequence)
        self._then(now + within, self._forget, sequence)

    def _forget(self, sequence: int, now: float) -> None:
        self._close(sequence)

    # What comes in

    def hear_ping(self, ping: Ping, source: Address, greeting: list[bytes]) -> None:
        """Answer, unless the ping is for another that had this address."""
        if ping.node in ("", self._membership.me):
            self._send(source, [*greeting, encode(Ack(ping.sequence, self._digest()))])

    def hear_ping_request(self, ask: PingReq, source: Address, now: float) -> None:
        """Another hears nothing of a node: ping it for the other."""
        if ask.node == self._membership.me:
            self._send(source, [encode(Ack(ask.sequence, self._digest()))])
            return
        if len(self._relayed) >= _RELAYED:
            return
        sequence = self.sequence()
        self._relayed[sequence] = (ask.node, source, ask.sequence)
        member = self._membership.members.get(ask.node)
        own: Addresses = member.everywhere()[:1] if member is not None else ()
        for address in dict.fromkeys(own + literal(ask.addresses[:2])):
            self._send(address, [encode(Ping(sequence, ask.node))])
        timeout = self._tuning.probe_interval - self._tuning.probe_timeout
        self._timers.at(now + timeout * _NACK_AT, self._unheard, sequence)

    def _unheard(self, sequence: int, now: float) -> None:
        asked = self._relayed.pop(sequence, None)
        if asked is not None:
            self._send(asked[1], [encode(Nack(asked[2]))])

    def hear_ack(self, sender: str, ack: Ack, now: float) -> bool:
        """True when ``sender`` answered a probe of ours itself.

        Who answered after the verdict is slow, not dead: it gets more time from now on, less again once it
        is quick. (Lifeguard has this for the prober alone.)
        """
        member = self._membership.members.get(sender)
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
        asked = self._relayed.get(ack.sequence)
        if asked is not None and asked[0] == sender:
            del self._relayed[ack.sequence]
            self._send(asked[1], [encode(Ack(asked[2], 0))])
        return False

    def hear_nack(self, sender: str, sequence: int) -> None:
        """A relay lives, though it heard nothing."""
        probe = self._probes.get(sequence)
        if probe is not None:
            probe.silent.discard(sender)

    def tcp_pong(self, sequence: int) -> None:
        """The probed node answered over TCP."""
        probe = self._probes.get(sequence)
        if probe is not None and probe.quick:
            self._membership.relax(probe.node)
        self._close(sequence)

    def hear_link(self, node: str) -> None:
        """A connection with ``node`` was made: it lives."""
        sequence = self._probed.get(node)
        if sequence is not None:
            self._close(sequence)


def _few(member: Member) -> Addresses:
    return member.everywhere()[:4]
