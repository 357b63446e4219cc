"""Computes the peak memory of a sequence of operations by the rules of ggml's graph allocator.

After ggml/src/ggml-alloc.c: a result overwrites an operand of the same size if the operation allows it and
nothing else needs the operand; a tensor is freed after its last use; a new one takes the smallest free block
that fits, else the end of the buffer.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import field

from sollold.facts import dataclass

_ALIGNMENT = 128
_ENDLESS = 1 << 62


@dataclass(slots=True)
class _Node:
    size: int
    sources: tuple[int, ...]
    over: tuple[int, ...]
    kept: bool
    empty: bool = False
    uses: int = 0
    offset: int = -1
    owned: bool = False


@dataclass(slots=True)
class Graph:
    """A graph under construction. Operations are numbered in the order in which they are computed."""

    _nodes: list[_Node] = field(default_factory=list)

    def add(
        self, size: int, *sources: int, inplace: bool = False, viewed: int = -1, kept: bool = False
    ) -> int:
        """Add an operation whose result takes ``size`` bytes; return its number.

        ``inplace``: the result may overwrite the first source that allows it, except ``viewed``, which is
        used through a view of another shape. ``kept``: never freed, like an output.
        """
        over = tuple(source for source in sources if source != viewed) if inplace else ()
        self._nodes.append(_Node(-(-size // _ALIGNMENT) * _ALIGNMENT, sources, over, kept))
        return len(self._nodes) - 1

    def empty(self, *sources: int, kept: bool = False) -> int:
        """Add an operation whose result has no elements but still takes a place; return its number."""
        self._nodes.append(_Node(0, sources, (), kept, empty=True))
        return len(self._nodes) - 1

    def __len__(self) -> int:
        """Return the number of operations."""
        return len(self._nodes)

    def peaks(self, ends: Sequence[int]) -> list[int]:
        """Return the bytes of the buffer that holds every result while it is needed, one figure per section.

        A section ends before the operation numbered in ``ends`` and begins where the previous one ended.
        """
        for node in self._nodes:
            for source in node.sources:
                self._nodes[source].uses += 1
        blocks = _Blocks()
        peaks: list[int] = []
        begin = 0
        for end in ends:
            blocks.end = blocks.tail
            for node in self._nodes[begin:end]:
                self._compute(node, blocks)
            peaks.append(blocks.end)
            begin = end
        return peaks

    def peak(self) -> int:
        """Return the bytes of the buffer that holds every result while it is needed."""
        return self.peaks([len(self)])[0]

    def _compute(self, node: _Node, blocks: _Blocks) -> None:
        self._place(node, blocks)
        for source in node.sources:
            operand = self._nodes[source]
            operand.uses -= 1
            if not operand.uses and operand.owned and not operand.kept:
                blocks.free(operand.offset, operand.size)
                operand.owned = False

    def _place(self, node: _Node, blocks: _Blocks) -> None:
        for source in node.over:
            operand = self._nodes[source]
            if operand.uses == 1 and operand.owned and not operand.kept and operand.size == node.size:
                node.offset, node.owned, operand.owned = operand.offset, True, False
                return
        if node.size or node.empty:
            node.offset, node.owned = blocks.allocate(node.size), True


@dataclass(slots=True)
class _Blocks:
    """Free blocks as (offset, size) in order, the last endless. ``end``: end of all memory used so far."""

    end: int = 0
    free_blocks: list[tuple[int, int]] = field(default_factory=lambda: [(0, _ENDLESS)])

    @property
    def tail(self) -> int:
        """Offset from which everything is free."""
        return self.free_blocks[-1][0]

    def allocate(self, size: int) -> int:
        best = -1
        for index, (_, room) in enumerate(self.free_blocks[:-1]):
            if room >= size and (best < 0 or room <= self.free_blocks[best][1]):
                best = index
        offset, room = self.free_blocks[best]
        if room == size:
            del self.free_blocks[best]
        else:
            self.free_blocks[best] = (offset + size, room - size)
        self.end = max(self.end, offset + size)
        return offset

    def free(self, offset: int, size: int) -> None:
        """Free an allocation: merge it with the first block adjacent to it, and that with one more.

        So an empty block, left by an empty result, keeps its neighbours apart.
        """
        blocks = self.free_blocks
        for index, (start, room) in enumerate(blocks):
            if start + room == offset:
                blocks[index] = (start, room + size)
                if index + 1 < len(blocks) and blocks[index + 1][0] == offset + size:
                    blocks[index] = (start, room + size + blocks.pop(index + 1)[1])
                return
            if offset + size == start:
                blocks[index] = (offset, size + room)
                if index and sum(blocks[index - 1]) == offset:
                    begin, length = blocks[index - 1]
                    blocks[index - 1 : index + 1] = [(begin, length + size + room)]
                return
        bisect.insort(blocks, (offset, size))
