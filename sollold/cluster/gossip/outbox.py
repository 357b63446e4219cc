"""Datagrams to send: messages for an address, with as much news as there is room for."""

from __future__ import annotations

from collections.abc import Callable

from sollold.cluster.gossip.actions import Action, Address, Send
from sollold.cluster.gossip.broadcast_queue import BroadcastQueue
from sollold.cluster.gossip.packet import compound, head, room


class Outbox:
    """Makes the packets.

    Args:
        node: this node's id, and `boot` its process: they are in front of each packet.
        news: what spreads by every packet.
        retransmits: how often each piece of news is sent.
        actions: where `Send` goes.

    Attributes:
        room: bytes of messages in one packet.
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
        """Messages in one datagram, filled up with news."""
        space = self.room
        for message in messages:
            space -= len(message)
        if len(self._news):
            messages = messages + self._news.take_messages(space, self._retransmits())
        self.send_alone(address, messages)

    def send_alone(self, address: Address, messages: list[bytes]) -> None:
        """Messages without news: perhaps nobody hears them, and each piece is sent a few times only."""
        self._actions.append(Send(address, compound(self._head, messages)))

    def send_news(self, address: Address) -> None:
        """News alone, if there is any that has not been sent often enough."""
        if messages := self._news.take_messages(self.room, self._retransmits()):
            self.send_alone(address, messages)
