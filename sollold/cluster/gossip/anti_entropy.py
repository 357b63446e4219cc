"""Decides when to exchange full states: when digests differ, when a peer has newer data, and periodically.

Nearly all periodic exchanges are skipped while digests agree.
"""

from __future__ import annotations

from hashlib import blake2b
from random import Random

from sollold.cluster.gossip.actions import Action, Address, PushPullWith
from sollold.cluster.gossip.config import Tuning
from sollold.cluster.gossip.membership import Membership
from sollold.cluster.gossip.registry import Registry
from sollold.cluster.gossip.timers import Timers

_MIN_DIFFERING = 2
"""Consecutive differing digests before a peer is asked: the missing news may already be on its way."""
_MAX_SKIPPED = 9
"""Maximum consecutive exchanges skipped because digests agree: digests do not cover dead nodes."""


class AntiEntropy:
    """Schedules exchanges of full states and picks the peers for them.

    Args:
        actions: the list that `PushPullWith` is appended to.

    Attributes:
        digest: covers all that is known of the live nodes; equal on nodes that know the same.
    """

    def __init__(
        self,
        membership: Membership,
        registry: Registry,
        *,
        tuning: Tuning,
        timers: Timers,
        random: Random,
        actions: list[Action],
        now: float,
    ) -> None:
        self.digest = 0
        self._membership = membership
        self._registry = registry
        self._tuning = tuning
        self._timers = timers
        self._random = random
        self._actions = actions
        self._marks: dict[str, int] = {}
        self._differing = 0
        self._skipped = 0
        self._compare_at = now
        self._compare_pause = tuning.sync_interval
        self._fetch_at = now
        self._fetch: tuple[str, tuple[Address, ...]] | None = None
        timers.at(now + random.random() * tuning.push_pull_interval, self._turn)

    def note(self, node: str) -> None:
        """Update the digest with what is known of ``node``."""
        mark = 0
        register = self._registry.get(node)
        version, boot = (register.version, register.boot) if register is not None else (0, 0)
        if node == self._membership.me:
            incarnation = self._membership.own.incarnation
        else:
            member = self._membership.members.get(node)
            incarnation = member.incarnation if member is not None and member.live else -1
        if incarnation >= 0:
            text = f"{node} {incarnation} {version} {boot}".encode()
            mark = int.from_bytes(blake2b(text, digest_size=7).digest(), "big")
        self.digest ^= self._marks.pop(node, 0) ^ mark
        if mark:
            self._marks[node] = mark

    def compare(self, sender: str, digest: int, now: float) -> None:
        """Compare a peer's digest; exchange states if it keeps differing, with growing pauses."""
        member = self._membership.members.get(sender)
        if digest == self.digest:
            self._differing = 0
            self._compare_pause = self._tuning.sync_interval
            if member is not None:
                member.agreed = now
            return
        self._differing += 1
        if member is not None and self._differing >= _MIN_DIFFERING and now >= self._compare_at:
            self._differing = 0
            self._compare_at = now + self._compare_pause * (0.5 + self._random.random())
            self._compare_pause = min(self._compare_pause * 2, self._tuning.push_pull_interval)
            self._actions.append(PushPullWith(sender, member.everywhere()))

    def want(self, node: str, addresses: tuple[Address, ...], now: float) -> None:
        """Exchange with a peer that has newer data, at most once per `Tuning.fetch_interval`."""
        if self._membership.own.leaving:
            return
        if now >= self._fetch_at:
            self._fetch_at = now + self._tuning.fetch_interval
            self._actions.append(PushPullWith(node, addresses))
            return
        if self._fetch is None:
            self._timers.at(self._fetch_at, self._fetch_turn)
        self._fetch = (node, addresses)

    def failed(self, node: str, now: float) -> None:
        """Try another peer after an exchange with ``node`` failed."""
        for member in self._membership.sample(1, without=node):
            self.want(member.node, member.everywhere(), now)

    def _fetch_turn(self, now: float) -> None:
        if self._fetch is not None:
            node, addresses = self._fetch
            self._fetch = None
            self.want(node, addresses, now)

    def _turn(self, now: float) -> None:
        pause = self._tuning.push_pull_every(self._membership.size)
        self._timers.at(now + pause * (0.75 + self._random.random() / 2), self._turn)
        if self._membership.own.leaving:
            return
        for member in self._membership.sample(1):
            if now - member.agreed < pause and self._skipped < _MAX_SKIPPED:
                # An exchange takes a TLS connection, which costs more than a minute's pings.
                self._skipped += 1
            else:
                self._skipped = 0
                self._actions.append(PushPullWith(member.node, member.everywhere()))
