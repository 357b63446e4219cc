"""How well this node keeps up itself (Lifeguard's local health awareness, arXiv:1707.00788)."""

from __future__ import annotations


class Awareness:
    """A score from 0 (keeps up) to ``most - 1``; time-outs are multiplied by the score plus one.

    A slow node sees its own lateness as the silence of others; with stretched time-outs it accuses less.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.score = 0

    def worse(self, by: int = 1) -> None:
        """A probe failed, a nack is missing, or an accusation had to be refuted."""
        self.score = min(self.score + by, self._most - 1)

    def better(self) -> None:
        """A probe was answered."""
        if self.score:
            self.score -= 1

    def stretch(self, seconds: float) -> float:
        """A time-out as this node should wait it."""
        return seconds * (self.score + 1)
