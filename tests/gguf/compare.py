"""Holds what was predicted of a model's buffers against what llama-server allocated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sollold.models.footprint.adapters import with_adapters
from sollold.models.footprint.footprint import Footprint, footprint
from sollold.models.footprint.read_shape import shape_of
from sollold.models.footprint.run_options import Run
from sollold.models.gguf import reader
from tests.gguf import llama_log, llama_run
from tests.gguf.llama_run import Workers

MIB = 1024 * 1024
_ROUNDED = MIB // 16
"""The log says hundredths of a MiB of several buffers."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One device: bytes predicted and allocated, of tensors, of caches, of compute buffers, of results."""

    device: str
    weights: tuple[int, int]
    state: tuple[int, int]
    compute: tuple[int, int]
    output: tuple[int, int] = (0, 0)

    @property
    def predicted(self) -> int:
        return self.weights[0] + self.state[0] + self.compute[0] + self.output[0]

    @property
    def actual(self) -> int:
        return self.weights[1] + self.state[1] + self.compute[1] + self.output[1]

    @property
    def error(self) -> int:
        return self.predicted - self.actual

    @property
    def within(self) -> bool:
        """At most 1 % or 4 MiB off, and never more than 1 MiB too little."""
        return -MIB - _ROUNDED <= self.error <= max(self.actual // 100, 4 * MIB) + _ROUNDED


def predicted(model: Path, run: Run) -> Footprint:
    return footprint(shape_of(reader.read(model)), run)


def compare(
    model: Path,
    run: Run,
    ready: Workers,
    split: Sequence[int],
    adapters: Sequence[Path] = (),
    more: Sequence[str] = (),
) -> list[Compared]:
    """Load the model spread so (layers of each worker, the output counted) and compare every device.

    ``more``: further words for llama-server.
    """
    shape = with_adapters(shape_of(reader.read(model)), [reader.read(adapter) for adapter in adapters])
    guess = footprint(shape, run)
    more = (*more, "--lora", ",".join(map(str, adapters))) if adapters else more
    # Adapters change what is computed, so it is looked at once they are there.
    prompt: Sequence[int] = [5, 6, 7] if adapters else ()
    if run.predicts:
        # A buffer grows when a whole batch comes.
        prompt = [300 + place % 100 for place in range(min(run.ubatch, run.request_context - 64) + 1)]
    log = llama_run.loaded(model, run, ready, split, *more, prompt=prompt, ended=run.predicts)
    actual = llama_log.buffers(log, list(ready.endpoints))
    devices, offloaded = len(split), sum(split)
    own = guess.layers + 1 - offloaded
    nothing = llama_log.Buffers()
    found: list[Compared] = []
    first = own
    for index, count in enumerate(split):
        last = first + count
        there = actual.get(f"RPC{index}", nothing)
        compute = guess.compute(first, last, devices=devices, offloaded=offloaded)
        found.append(
            Compared(
                f"RPC{index}",
                (sum(guess.weights[first:last]), there.model),
                (sum(guess.state[first:last]), there.state),
                (compute, there.compute),
            )
        )
        first = last
    there = actual.get("CPU", nothing)
    compute = guess.host_compute(devices=devices, offloaded=offloaded)
    found.append(
        Compared(
            "CPU",
            (guess.host_tensors(own), there.model),
            (sum(guess.state[:own]), there.state),
            (compute, there.compute),
            (guess.results, there.output) if not run.predicts else (0, 0),
        )
    )
    return found
