"""Builds datagrams: messages for an address, filled up with news."""

from __future__ import annotations

from collections.abc import Callable

from sollold.cluster.gossip.actions import Action, Address, Send
from sollold.cluster.gossip.broadcast_queue import BroadcastQueue
from sollold.cluster.gossip.packet import compound, head, room


class Outbox:
    """Builds packets and queues them for sending.

    Args:
        node, boot: this node's id and process number, at the start of each packet.
        news: messages that travel along with every packet.
        retransmits: returns how often each of them is sent.
        actions: the list that `Send` is appended to.

    Attributes:
        room: bytes available for messages in one packet.
    """

    def __init__(
        self,
        node: str,
        boot: int,
        *,
        news: BroadcastQueue,
        retransmits: Callable[[], int],
        actions: list[Action],
    ) -> None:
        self._head = head(node, boot)
        self.room = room(self._head)
        self._news = news
        self._retransmits = retransmits
        self._actions = actions

    def send(self, address: Address, messages: list[bytes]) -> None:
        """Send messages in one datagram, filled up with news."""
        space = self.room
        for message in messages:
            space -= len(message)
        if len(self._news):
            messages = messages + self._news.take_messages(space, self._retransmits())
        self.send_alone(address, messages)

    def send_alone(self, address: Address, messages: list[bytes]) -> None:
        """Send messages without news: possibly no node is there, and news is sent a few times only."""
        self._actions.append(Send(address, compound(self._head, messages)))

    def send_news(self, address: Address) -> None:
        """Send news alone, if any is queued."""
        if messages := self._news.take_messages(self.room, self._retransmits()):
            self.send_alone(address, messages)
