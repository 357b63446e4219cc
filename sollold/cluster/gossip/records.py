"""Spreads this node's record, and takes note of those that arrive."""

from __future__ import annotations

from collections.abc import Callable

from sollold.cluster.gossip.anti_entropy import AntiEntropy
from sollold.cluster.gossip.broadcast_queue import BroadcastQueue
from sollold.cluster.gossip.leadership import Leadership
from sollold.cluster.gossip.membership import Membership
from sollold.cluster.gossip.registry import Merge, Registry


class Records:
    """Handles changes of the records in ``registry``.

    Args:
        room: bytes available for messages in one packet.
        persist: persists the versions of records that this node has used.
        updated: called with the node whose record has changed.

    Attributes:
        rejected: number of packets, push-pull bodies and records that could not be decoded.
        refused: numbers of refused records, by reason; see `sollold.cluster.gossip.known.Known.refused`.
    """

    def __init__(
        self,
        membership: Membership,
        registry: Registry,
        leadership: Leadership,
        anti_entropy: AntiEntropy,
        *,
        news: BroadcastQueue,
        room: int,
        persist: Callable[[], None],
        updated: Callable[[str], None],
    ) -> None:
        self._membership = membership
        self._registry = registry
        self._leadership = leadership
        self._anti_entropy = anti_entropy
        self._news = news
        self._room = room
        self._persist = persist
        self._updated = updated
        self.rejected = 0
        self.refused = {"record": 0, "forged": 0}

    def publish(self) -> None:
        """Spread this node's record."""
        if not self._membership.own.withdrawn:
            delta = self._registry.delta(self._room, self._room // 3)
            self._news.add("record", self._membership.me, delta)

    def own_changed(self) -> None:
        """Handle a change of this node's record."""
        self.publish()
        self._anti_entropy.note(self._membership.me)
        self._persist()
        self._updated(self._membership.me)

    def pass_on(self, node: str) -> None:
        """Spread the changed record of ``node``."""
        self._news.add("record", node, self._registry.delta_of(node, self._room))

    def merged(self, node: str, merge: Merge) -> None:
        """Handle the result of merging the record of ``node``."""
        if merge is Merge.NEWER:
            self._anti_entropy.note(node)
            if self._registry.leader_may_change:
                self._registry.leader_may_change = False
                self._leadership.observe(self._registry.highest)
                self._leadership.due = True
            self._updated(node)
        elif merge is Merge.RAISED:
            self.own_changed()
        elif merge is Merge.BROKEN:
            self.rejected += 1
        elif merge is Merge.IMPOSSIBLE:
            self.refused["record"] += 1
        elif merge is Merge.FORGED:
            self.refused["forged"] += 1
