"""Tracks how well this node itself keeps up (Lifeguard's local health awareness, arXiv:1707.00788)."""

from __future__ import annotations


class Awareness:
    """A score from 0 (keeps up) to ``limit - 1``; timeouts are multiplied by the score plus one.

    A slow node mistakes its own lateness for the silence of others; longer timeouts make it accuse less.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.score = 0

    def worse(self, amount: int = 1) -> None:
        """Raise the score: a probe failed, a nack is missing, or an accusation had to be refuted."""
        self.score = min(self.score + amount, self._limit - 1)

    def better(self) -> None:
        """Lower the score: a probe was answered."""
        if self.score:
            self.score -= 1

    def stretch(self, seconds: float) -> float:
        """Return the timeout multiplied for this node's score."""
        return seconds * (self.score + 1)
