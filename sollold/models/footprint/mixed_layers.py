"""Computes the memory of layers in models that mix recurrent blocks with others.

Each layer's need depends on its neighbours. It is computed on demand: a planner queries many ranges, but most
of them are alike.
"""

from __future__ import annotations

from dataclasses import field

from sollold.facts import dataclass
from sollold.models.footprint import block_graph
from sollold.models.footprint.block import FLOAT, Block
from sollold.models.footprint.device_boundary import Handed, Opening
from sollold.models.footprint.recurrent import MIXERS, fetches_early

NEAR = 4
"""Number of blocks before and after a block that affect its need."""


@dataclass(frozen=True, slots=True)
class _Begins:
    """How a device begins: as the head's CPU, directly after it, with output token ids among its inputs."""

    home: bool
    hosted: bool
    outputs: bool


@dataclass(frozen=True, slots=True)
class MixedLayers:
    """The blocks of a model; equal blocks have equal numbers in ``kinds``.

    ``slack``: bytes to add to every result. ``raw``: bytes of the per-layer embeddings of all layers;
    ``scaled``: the first layer's input is scaled.
    """

    row: block_graph.Row
    kinds: tuple[int, ...]
    slack: int
    raw: int
    scaled: bool
    _middle: dict[tuple[bool, bool], tuple[int, ...]] = field(default_factory=dict, compare=False, repr=False)
    _peaks: dict[tuple[object, ...], int] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, row: block_graph.Row, *, slack: int, raw: int, scaled: bool) -> MixedLayers | None:
        """Describe a model's blocks; None if no block's need depends on others."""
        if not any(block.mixer in MIXERS or (block.followed and not block.mixer) for block, _ in row):
            return None
        numbers: dict[object, int] = {}
        return cls(row, tuple(numbers.setdefault(pair, len(numbers)) for pair in row), slack, raw, scaled)

    def peak(self, first: int, last: int, *, piped: bool, own: int) -> int:
        """Return the peak bytes of the operations of layers ``first`` to ``last - 1`` on one device.

        ``own``: number of layers on the head's CPU.
        """
        outputs = last >= len(self.row)
        last = min(last, len(self.row))
        if first >= last:
            return 0
        start_end = min(first + NEAR + 1, last)
        ends = start_end == last and not piped
        peak = self._peak(
            first,
            start_end,
            piped,
            _Begins(home=first == 0 < own, hosted=first == own, outputs=outputs),
            ends=ends,
        )
        if start_end < last:
            peak = max(peak, *self._middle_peaks(piped, first == 0)[start_end:last])
        if start_end < last and not piped:
            peak = max(peak, self._peak(last - NEAR - 1, last, piped, ends=True, opened=first == 0))
        return self.slack + peak

    def _middle_peaks(self, piped: bool, opened: bool) -> tuple[int, ...]:
        """Return the need of each layer far from where its device begins and ends."""
        if (piped, opened) not in self._middle:
            self._middle[piped, opened] = tuple(
                self._peak(max(index - NEAR, 0), index + 1, piped, opened=opened)
                for index in range(len(self.row))
            )
        return self._middle[piped, opened]

    def passed(self, index: int) -> tuple[int, int]:
        """Return the bytes transferred to and from a device that begins at a layer, besides the hidden state.

        A recurrent layer fetches its state before the previous layer has ended. The remaining operations of
        that layer that have no weights are then scheduled on the state's device, and need their operands
        there.
        """
        layer = self._interrupted(index)
        if layer is None:
            return 0, 0
        block, batch = self.row[layer]
        if block.experts:
            return (0 if block.ff_shared else block.embd * batch.tokens * FLOAT), 0
        if block.mixer == "conv" or (block.q and not batch.rotate_v):
            return 0, 0
        return block.passed(batch.tokens)

    def _interrupted(self, index: int) -> int | None:
        """Return the layer before ``index`` that ends only after a later layer's early fetch, if any."""
        following = next(
            (block for block, _ in self.row[index:] if block_graph.added_explicitly(block)), None
        )
        if following is None or not fetches_early(following):
            return None
        return next(
            (layer for layer in range(index - 1, -1, -1) if block_graph.added_explicitly(self.row[layer][0])),
            None,
        )

    def _peak(
        self,
        begin: int,
        end: int,
        piped: bool,
        begins: _Begins | None = None,
        *,
        ends: bool = False,
        opened: bool = False,
    ) -> int:
        """Return the need of layers ``begin`` to ``end - 1``.

        Unless a device begins or ends with them, only the need of the last one."""
        handed, layer = None, None
        if begins is not None and begin > 0 and not piped:
            layer = self._interrupted(begin)
            handed = (self.kinds[begin - 1], None if layer is None else self.kinds[layer])
        last = end == len(self.row)
        opening = None
        if opened and self.raw and self.scaled:
            opening = Opening(self.raw, done=True)
        elif begins is not None and begin == 0 and self.scaled:
            opening = Opening(self.raw, done=False)
        key = (
            opening is not None,
            piped,
            begins,
            ends,
            last,
            handed,
            self.kinds[begin:end],
            self.kinds[end : end + NEAR],
        )
        if key not in self._peaks:
            needs = block_graph.peaks(
                self.row[begin:end],
                self.row[end : end + NEAR],
                piped=piped,
                first=begins is not None,
                last=last,
                ends=ends,
                home=begins is not None and begins.home,
                outputs=begins is not None and begins.outputs,
                opening=opening,
                handed=self._handed(begin, layer, begins.hosted) if begins is not None and handed else None,
            )
            self._peaks[key] = needs[-1] if begins is None and not ends else max(needs)
        return self._peaks[key]

    def _handed(self, begin: int, layer: int | None, hosted: bool) -> Handed:
        interrupted: Block | None = None
        rotated = False
        if layer is not None:
            interrupted, rotated = self.row[layer][0], self.row[layer][1].rotate_v
        return Handed(hosted, self.row[begin - 1][0], interrupted, rotated)
