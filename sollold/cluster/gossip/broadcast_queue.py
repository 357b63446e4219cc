"""Queue of gossip messages: each is sent a limited number of times, the least sent and newest first."""

from __future__ import annotations


class BroadcastQueue:
    """A queue of encoded messages, one per subject: newer news of a subject replaces older."""

    def __init__(self) -> None:
        self._tiers: list[dict[tuple[str, str], bytes]] = []
        """Messages by the number of times they have been sent."""
        self._tier: dict[tuple[str, str], int] = {}

    def __len__(self) -> int:
        return len(self._tier)

    def add(self, kind: str, node: str, message: bytes) -> None:
        """Queue ``message``, replacing any of the same kind about the same node."""
        self.withdraw(kind, node)
        if not self._tiers:
            self._tiers.append({})
        self._tiers[0][kind, node] = message
        self._tier[kind, node] = 0

    def withdraw(self, kind: str, node: str) -> None:
        """Remove the queued message of this kind about this node, if any."""
        tier = self._tier.pop((kind, node), None)
        if tier is not None:
            del self._tiers[tier][kind, node]

    def clear(self) -> None:
        """Remove all queued messages."""
        self._tiers.clear()
        self._tier.clear()

    def take_messages(self, room: int, limit: int) -> list[bytes]:
        """Return messages of at most ``room`` bytes in total for a packet; each is sent ``limit`` times."""
        if not self._tier:
            return []
        taken: list[tuple[int, tuple[str, str], bytes]] = []
        for number, tier in enumerate(self._tiers):
            for key, message in reversed(tier.items()):
                if len(message) <= room:
                    room -= len(message)
                    taken.append((number, key, message))
            if room < 8:
                break
        for number, key, message in taken:
            del self._tiers[number][key]
            if number + 1 >= limit:
                del self._tier[key]
                continue
            if number + 1 == len(self._tiers):
                self._tiers.append({})
            self._tiers[number + 1][key] = message
            self._tier[key] = number + 1
        return [message for _, _, message in taken]
