"""Probe order: every node once per round, each round in a new random order."""

from __future__ import annotations

from collections.abc import Callable
from random import Random


class ProbeOrder:
    """A shuffled round robin. Bounds the detection time of a death to two rounds (SWIM, section 4.3)."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._nodes: list[str] = []
        self._index = 0
        self._urgent: dict[str, None] = {}

    def add(self, node: str) -> None:
        """Insert ``node`` at a random position, so that a new node is not probed by all at once."""
        self._nodes.insert(self._random.randint(0, len(self._nodes)), node)

    def remove(self, node: str) -> None:
        """Stop probing ``node``."""
        index = self._nodes.index(node)
        del self._nodes[index]
        if index < self._index:
            self._index -= 1
        self._urgent.pop(node, None)

    def hurry(self, node: str) -> None:
        """Probe ``node`` next, out of turn."""
        self._urgent[node] = None

    def next(self, due: Callable[[str], bool]) -> str | None:
        """Return the next node that is ``due``, or an urgent one; None if there is none.

        A node that is not due has had its turn: it needs no probe in this round.
        """
        if self._urgent:
            node = next(iter(self._urgent))
            del self._urgent[node]
            return node
        for _ in range(len(self._nodes)):
            if self._index >= len(self._nodes):
                self._random.shuffle(self._nodes)
                self._index = 0
            node = self._nodes[self._index]
            self._index += 1
            if due(node):
                return node
        return None
