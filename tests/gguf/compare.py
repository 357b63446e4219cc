"""Compares predicted buffer sizes of a model with those that llama-server allocated."""

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
"""Rounding error: the log gives several buffers in hundredths of a MiB."""


@dataclass(frozen=True, slots=True)
class Compared:
    """Bytes of one device, each predicted and allocated: tensors, caches, compute buffers, results."""

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
        """Whether the prediction is at most 1 % or 4 MiB too large, and at most 1 MiB too small."""
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
    """Load a model with llama-server and compare the buffers of every device.

    Args:
        model: the model's file.
        run: how it runs.
        ready: the running workers.
        split: layers of each worker; the output counts as a layer.
        adapters: files of LoRA adapters.
        more: further arguments of llama-server.
    """
    shape = with_adapters(shape_of(reader.read(model)), [reader.read(adapter) for adapter in adapters])
    guess = footprint(shape, run)
    more = (*more, "--lora", ",".join(map(str, adapters))) if adapters else more
    # Compute buffers are allocated again after adapters are loaded, so the log is read after a prompt.
    prompt: Sequence[int] = [5, 6, 7] if adapters else ()
    if run.predicts:
        # A buffer grows with the first full batch.
        prompt = [300 + position % 100 for position in range(min(run.ubatch, run.request_context - 64) + 1)]
    log = llama_run.loaded(model, run, ready, split, *more, prompt=prompt, ended=run.predicts)
    actual = llama_log.buffers(log, list(ready.endpoints))
    devices, offloaded = len(split), sum(split)
    on_host = guess.layers + 1 - offloaded
    empty = llama_log.Buffers()
    compared: list[Compared] = []
    first = on_host
    for index, count in enumerate(split):
        last = first + count
        allocated = actual.get(f"RPC{index}", empty)
        compute = guess.compute(first, last, devices=devices, offloaded=offloaded)
        compared.append(
            Compared(
                f"RPC{index}",
                (sum(guess.weights[first:last]), allocated.model),
                (sum(guess.state[first:last]), allocated.state),
                (compute, allocated.compute),
            )
        )
        first = last
    allocated = actual.get("CPU", empty)
    compute = guess.host_compute(devices=devices, offloaded=offloaded)
    compared.append(
        Compared(
            "CPU",
            (guess.host_tensors(on_host), allocated.model),
            (sum(guess.state[:on_host]), allocated.state),
            (compute, allocated.compute),
            (guess.results, allocated.output) if not run.predicts else (0, 0),
        )
    )
    return compared
