"""What the device that begins a model makes before all else, or in the midst of the first block (Gemma 4)."""

from __future__ import annotations

from dataclasses import dataclass

from sollold.models.graph import Graph


@dataclass(slots=True)
class Opening:
    """The hidden state, scaled, and what layers have of their own: of that it holds all to the end.

    Attributes:
        raw: bytes of what layers have of their own, all together.
        done: it was made long before.
        selected, scaled: what it is made of.
    """

    raw: int
    done: bool
    selected: int = -1
    scaled: int = -1

    def scale(self, graph: Graph, state: int, size: int, *, piped: bool, home: bool) -> int:
        """The hidden state, scaled; ``home``: by the head's processor, in place."""
        # Pipelining keeps what it is made of, which is counted elsewhere.
        source = graph.add(0 if piped else self.raw)
        self.selected = graph.add(self.raw, source)
        self.scaled = graph.add(size, state, inplace=home)
        return self.scaled

    def make(self, graph: Graph) -> None:
        """What layers have of their own, once that is needed."""
        if not self.done:
            projected = graph.add(self.raw, graph.add(self.raw, self.scaled))
            graph.add(self.raw, graph.add(self.raw, projected, self.selected, inplace=True), kept=True)
            self.done = True
