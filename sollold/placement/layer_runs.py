"""Works out which runs of layers a device can hold. Seconds and bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import field
from itertools import accumulate

from sollold.facts import dataclass


@dataclass(frozen=True, slots=True)
class Buffers:
    """Bytes that a device takes besides its layers, by the position of its run.

    Attributes:
        begins: for a run that starts with the first layer.
        middle: for a run with neither the first layer nor the output.
        ends: for a run that ends with the output.
        output: for the output alone.
        exact: maps (first, last) to the exact bytes; if set, the four above are only bounds.
        least: smallest value of ``exact``.
    """

    begins: int = 0
    middle: int = 0
    ends: int = 0
    output: int = 0
    exact: Callable[[int, int], int] | None = None
    least: int = 0


@dataclass(frozen=True, slots=True)
class Bin:
    """A device as the search sees it. Seconds and bytes.

    Attributes:
        rate: seconds per active byte.
        hop: seconds per token when the device is used at all.
        tail: extra seconds per token when it holds the output.
        room: bytes for layers and their buffers.
        loading: bytes for the weights plus their largest tensor during loading (for the ``first`` kind, the
            weights alone); None: loading never takes more than ``room``.
        group: at most one bin of a group is used; -1: no group.
        worker: number of the machine that must run a worker for it; -1: none.
        first: whether it may hold only the first layers, never the output; ``room`` then excludes buffers.
    """

    rate: float
    hop: float
    tail: float
    room: int
    loading: int | None = None
    group: int = -1
    worker: int = -1
    first: bool = False


@dataclass(frozen=True, slots=True)
class Split:
    """Runs of layers in order: (index of the bin, first, last); the output is the last layer."""

    seconds: float
    runs: tuple[tuple[int, int, int], ...]


@dataclass(slots=True)
class BinBounds:
    """A bin with precomputed bounds.

    Attributes:
        index: index of the bin.
        cap: maximum active bytes of a run that fits.
        low: for each end of a run, the lowest first layer with which it fits.
        low_last: the same for the run that ends the model.
        read: cumulative seconds to read the layers before each position; empty until first needed.
    """

    index: int
    bin: Bin
    cap: float
    low: list[int]
    low_last: int
    read: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Layers:
    """The layers of a model in a row, the output as the last.

    Attributes:
        memory: bytes that each layer takes; ``weights``: the bytes of these that are read from the file;
            ``largest``: bytes of each layer's largest tensor.
        active: bytes of each layer that are read per token.
    """

    memory: Sequence[int]
    active: Sequence[int]
    weights: Sequence[int] = ()
    buffers: Buffers = Buffers()
    largest: Sequence[int] = ()
    mem: list[int] = field(init=False)
    act: list[int] = field(init=False)
    load: list[int] = field(init=False)
    _max_tensor: int = field(init=False)
    _peaks: dict[tuple[int, int], int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.mem = [0, *accumulate(self.memory)]
        self.act = [0, *accumulate(self.active)]
        self.load = [0, *accumulate(self.weights)] if self.weights else self.mem
        self._max_tensor = max(self.largest, default=0)

    def _loads(self, device: Bin, start: int, end: int) -> bool:
        """Return whether the run's weights fit while they are loaded."""
        limit = device.loading
        if limit is None:
            return True
        size = self.load[end] - self.load[start]
        # This decides nearly all cases.
        if size + self._max_tensor <= limit or device.first or size > limit:
            return size <= limit
        peak = self._peaks.get((start, end))
        if peak is None:
            peak = self._peaks[start, end] = max(self.largest[start:end])
        return size + peak <= limit

    def item(self, index: int, device: Bin) -> BinBounds:
        """Precompute the bounds of a bin."""
        exact = None if device.first else self.buffers.exact
        low = self._lowest(device) if exact is None else self._lowest_by(device, exact)
        count = len(self.mem) - 1
        low_last = count
        if not device.first:
            while low_last > 0 and self._ends(device, low_last - 1, exact):
                low_last -= 1
        act = self.act
        cap = act[count] - act[low_last]
        for end, start in enumerate(low):
            if act[end] - act[start] > cap and not (device.first and start):
                cap = act[end] - act[start]
        low.append(count)
        return BinBounds(index, device, float(cap), low, low_last)

    def _lowest(self, device: Bin) -> list[int]:
        """Return, for each end but the model's, the lowest first layer with which a run fits."""
        mem = self.mem
        buffers = self.buffers
        room = device.room if device.first else device.room - buffers.middle
        begins = device.room if device.first else device.room - buffers.begins
        low = [0] * (len(mem) - 1)
        start = 0
        for end in range(1, len(low)):
            while start < end and mem[end] - mem[start] > room:
                start += 1
            while start < end and not self._loads(device, start, end):
                start += 1
            if not start and mem[end] > begins:
                start = 1
            low[end] = start
        return low

    def _lowest_by(self, device: Bin, exact: Callable[[int, int], int]) -> list[int]:
        """Do the same with the exact buffers of each run."""
        mem = self.mem
        # Only sizes between these two need the exact buffers.
        max_size = device.room - self.buffers.least
        safe_size = device.room - max(self.buffers.begins, self.buffers.middle)
        low = [0] * (len(mem) - 1)
        start = 0
        for end in range(1, len(low)):
            while start < end:
                size = mem[end] - mem[start]
                fits = size <= safe_size or (size <= max_size and size + exact(start, end) <= device.room)
                if fits and self._loads(device, start, end):
                    break
                start += 1
            low[end] = start
        return low

    def _ends(self, device: Bin, start: int, exact: Callable[[int, int], int] | None) -> bool:
        """Return whether the layers from ``start`` on fit together with the output."""
        mem = self.mem
        count = len(mem) - 1
        if exact is not None:
            buffer = exact(start, count)
        else:
            buffer = self.buffers.output if start == count - 1 else self.buffers.ends
        if mem[count] - mem[start] + buffer > device.room:
            return False
        return self._loads(device, start, count)
