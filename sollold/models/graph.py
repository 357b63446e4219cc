"""How much memory a sequence of operations needs at once, by the rules of ggml's graph allocator.

After ggml/src/ggml-alloc.c: a result is written over an operand of the same size where the operation allows
it and nothing else needs the operand; a tensor is freed after its last use; a new one takes the smallest free
block that holds it, else the end.
"""

from __future__ import annotations

from dataclasses import dataclass, field

_ALIGNMENT = 128


@dataclass(slots=True)
class _Node:
    size: int
    sources: tuple[int, ...]
    inplace: bool
    kept: bool
    uses: int = 0
    offset: int = -1
    owned: bool = False


@dataclass(slots=True)
class Graph:
    """A graph under construction. Operations are numbered in the order in which they are computed."""

    _nodes: list[_Node] = field(default_factory=list)

    def add(self, size: int, *sources: int, inplace: bool = False, kept: bool = False) -> int:
        """An operation whose result takes ``size`` bytes. ``kept``: never freed, as an output is."""
        self._nodes.append(_Node(-(-size // _ALIGNMENT) * _ALIGNMENT, sources, inplace, kept))
        return len(self._nodes) - 1

    def __len__(self) -> int:
        """How many operations there are."""
        return len(self._nodes)

    def peak(self) -> int:
        """Bytes of the buffer that holds every result while it is needed."""
        for node in self._nodes:
            for source in node.sources:
                self._nodes[source].uses += 1
        blocks = _Blocks()
        for node in self._nodes:
            self._place(node, blocks)
            for source in node.sources:
                operand = self._nodes[source]
                operand.uses -= 1
                if not operand.uses and operand.owned and not operand.kept:
                    blocks.free(operand.offset, operand.size)
                    operand.owned = False
        return blocks.end

    def _place(self, node: _Node, blocks: _Blocks) -> None:
        if node.inplace:
            for source in node.sources:
                operand = self._nodes[source]
                if operand.uses == 1 and operand.owned and not operand.kept and operand.size == node.size:
                    node.offset, node.owned, operand.owned = operand.offset, True, False
                    return
        node.offset, node.owned = blocks.take(node.size), True


@dataclass(slots=True)
class _Blocks:
    """Free blocks as (offset, size) in order; behind ``end`` everything is free."""

    end: int = 0
    tail: int = 0
    free_blocks: list[tuple[int, int]] = field(default_factory=list)

    def take(self, size: int) -> int:
        best = -1
        for index, (_, room) in enumerate(self.free_blocks):
            if room >= size and (best < 0 or room <= self.free_blocks[best][1]):
                best = index
        if best < 0:
            offset = self.tail
            self.tail += size
            self.end = max(self.end, self.tail)
            return offset
        offset, room = self.free_blocks[best]
        if room == size:
            del self.free_blocks[best]
        else:
            self.free_blocks[best] = (offset + size, room - size)
        return offset

    def free(self, offset: int, size: int) -> None:
        merged: list[tuple[int, int]] = []
        for start, room in sorted([*self.free_blocks, (offset, size)]):
            if merged and merged[-1][0] + merged[-1][1] == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + room)
            else:
                merged.append((start, room))
        if merged and merged[-1][0] + merged[-1][1] == self.tail:
            self.tail = merged.pop()[0]
        self.free_blocks = merged
