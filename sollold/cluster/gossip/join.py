"""Finds a node's first peers: tries addresses from mDNS, seeds and disk until one responds."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from sollold.cluster.gossip.actions import Action, Address, PushPullWith
from sollold.cluster.gossip.config import Tuning
from sollold.cluster.gossip.membership import Membership
from sollold.cluster.gossip.packet import Ping, encode
from sollold.cluster.gossip.timers import Timers

_MAX_INTRODUCTIONS = 1024
"""Maximum introductions in progress."""
_MAX_TRIES = 4
"""Attempts per introduction that is not kept: a datagram may be lost."""
_MAX_ADDRESSES = 8


class _Introduction:
    __slots__ = ("addresses", "answered", "keep", "key", "sequence", "tries")

    def __init__(self, key: str | frozenset[Address], addresses: tuple[Address, ...], keep: bool) -> None:
        self.key = key
        self.addresses = addresses
        self.keep = keep
        self.tries = 0
        self.sequence = 0
        self.answered = False


class Joins:
    """Pings introduced addresses and dead nodes, and starts a push-pull with nodes that respond.

    Args:
        send: sends encoded messages to an address, without news: possibly no node is there.
        sequence: as in `probe.Prober`.
        actions: the list that `PushPullWith` is appended to.
    """

    def __init__(
        self,
        membership: Membership,
        *,
        tuning: Tuning,
        timers: Timers,
        random: Random,
        send: Callable[[Address, list[bytes]], None],
        sequence: Callable[[], int],
        actions: list[Action],
    ) -> None:
        self._membership = membership
        self._tuning = tuning
        self._timers = timers
        self._random = random
        self._send = send
        self._sequence = sequence
        self._actions = actions
        self._introductions: dict[str | frozenset[Address], _Introduction] = {}
        self._pinged: dict[int, _Introduction] = {}

    def add(self, addresses: tuple[Address, ...], now: float, *, keep: bool, source: str) -> None:
        """Try ``addresses``, where a node may be; see `Gossip.introduce`."""
        addresses = tuple(a for a in addresses if a not in self._membership.own.addresses)[:_MAX_ADDRESSES]
        if not addresses:
            return
        # Name servers return the same addresses in varying order.
        key = source or frozenset(addresses)
        known = self._introductions.get(key)
        if known is not None and set(known.addresses) == set(addresses):
            known.keep = known.keep or keep
            known.tries = min(known.tries, 1)
            return
        if known is None and len(self._introductions) >= _MAX_INTRODUCTIONS:
            return
        introduction = self._introductions[key] = _Introduction(key, addresses, keep)
        self._try(introduction, now)

    def _known(self, introduction: _Introduction) -> bool:
        """Whether a live node has one of the addresses, or the meant node lives elsewhere."""
        wanted = set(introduction.addresses)
        members = self._membership.members
        if isinstance(introduction.key, str):
            member = members.get(introduction.key)
            if member is not None and member.live:
                return True
        return any(not wanted.isdisjoint(members[node].everywhere()) for node in self._membership.live)

    def _try(self, introduction: _Introduction, now: float) -> None:
        self._pinged.pop(introduction.sequence, None)
        if self._membership.own.leaving or self._introductions.get(introduction.key) is not introduction:
            return
        tuning = self._tuning
        known = self._known(introduction)
        if not known:
            introduction.answered = False
            introduction.sequence = self._sequence()
            self._pinged[introduction.sequence] = introduction
            for address in introduction.addresses:
                hello = encode(Ping(introduction.sequence, ""))
                self._send(address, [self._membership.own.alive(), hello])
            self._timers.at(now + tuning.introduce_timeout, self._fall_back, introduction)
            introduction.tries += 1
        if not introduction.keep and (known or introduction.tries >= _MAX_TRIES):
            self._introductions.pop(introduction.key, None)
            self._timers.at(now + tuning.retry_max, self._forget, introduction)
            return
        # While a live node is there an occasional check is enough: dead nodes are retried elsewhere.
        pause = tuning.retry_max if known else tuning.retry_min * 2.0 ** min(introduction.tries, 16)
        pause = min(pause, tuning.retry_max)
        self._timers.at(now + pause * (0.75 + self._random.random() / 2), self._try, introduction)

    def try_dead(self) -> None:
        """Try a dead node: it may live behind a partition that has healed."""
        membership = self._membership
        members = membership.members.values()
        dead = [member for member in members if not member.live and member.node not in membership.evicted]
        if dead and not membership.own.leaving:
            member = self._random.choice(dead)
            for address in member.everywhere()[:4]:
                ping = encode(Ping(self._sequence(), member.node))
                self._send(address, [membership.own.alive(), *member.state(), ping])

    def _forget(self, introduction: _Introduction, now: float) -> None:
        """Ignore acks to the last ping of an introduction that was given up."""
        self._pinged.pop(introduction.sequence, None)

    def _fall_back(self, introduction: _Introduction, now: float) -> None:
        if not introduction.answered and not self._known(introduction):
            self._actions.append(PushPullWith("", introduction.addresses))

    def hear_ack(self, sender: str, sequence: int, source: Address) -> None:
        """Start a push-pull with a node that responded."""
        introduction = self._pinged.pop(sequence, None)
        if introduction is not None and not introduction.answered:
            introduction.answered = True
            self._actions.append(PushPullWith(sender, (source,)))
