"""Print a table of predicted and measured memory for every architecture in many configurations.

``python -m tests.bench.footprint [ARCHITECTURE ...]``
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sollold.models.footprint.run_options import Run
from tests.gguf import llama_run
from tests.gguf.architectures import ARCHITECTURES, EMBEDDERS
from tests.gguf.compare import MIB, compare
from tests.gguf.llama_run import LoadError, Workers
from tests.gguf.size import Size
from tests.gguf.writer import write

_SIZES = {
    "small": Size(layers=8),
    "broad": Size(
        layers=8, embd=1024, heads=16, heads_kv=4, ff=3072, vocab=32000, ff_expert=512, experts=8, window=1024
    ),
}
_RUNS: dict[str, tuple[tuple[int, ...], Run]] = {
    "1 device": ((9,), Run(context=8192, slots=1)),
    "2 devices": ((4, 5), Run(context=4096, slots=2)),
    "3 devices, 4 slots": ((3, 3, 3), Run(context=16384, slots=4)),
    "3 devices, one pool": ((2, 3, 4), Run(context=8192, slots=4, unified=True)),
    "ubatch 128": ((4, 5), Run(context=4096, slots=2, ubatch=128)),
    "ubatch 1024": ((4, 5), Run(context=8192, slots=1, ubatch=1024)),
    "q8_0 cache": ((4, 5), Run(context=4096, slots=2, type_k="q8_0", type_v="q8_0")),
    "no flash attention": ((4, 5), Run(context=2048, slots=2, flash="off")),
    "output alone": ((8, 1), Run(context=4096, slots=2)),
    "half with the head": ((2, 3), Run(context=4096, slots=2)),
}
_LAYERS = {"gemma3n": 24}
_PREDICTING = ("glm4moe", "deepseek2", "qwen35", "qwen35moe")
"""Architectures with a next-token-prediction layer that llama.cpp can use for drafts."""


def _rows(ready: Workers, names: list[str], folder: Path) -> Iterator[tuple[bool, str]]:
    """Yield (goal met, row) for each model and configuration."""
    for name in names:
        for kind, size in _SIZES.items():
            for predicts in (False, True) if name in _PREDICTING else (False,):
                layers = _LAYERS.get(name, size.layers + predicts)
                size = dataclasses.replace(size, layers=layers, nextn=int(predicts))
                model = write(folder / "a.gguf", name, size)
                for title, (split, run) in _RUNS.items():
                    run = dataclasses.replace(
                        run, embedding=name in EMBEDDERS, predicts=predicts, drafts=3 * predicts
                    )
                    given = (*split[:-1], split[-1] + layers - 8)
                    title = f"{title}, drafts" if predicts else title
                    yield _row(ready, model, f"{name:14} {kind:6} {title:27}", run, given)


def _row(ready: Workers, model: Path, title: str, run: Run, split: tuple[int, ...]) -> tuple[bool, str]:
    if run.flash == "auto":
        # As in plans; by default llama.cpp disables it for some splits.
        run = dataclasses.replace(run, flash="on")
    try:
        found = compare(model, run, ready, split)
    except LoadError as error:
        last = [line for line in str(error).splitlines() if " E " in line]
        return False, f"{title} not loaded: {(last or [''])[0][-60:]}  <--"
    worst = max(found, key=lambda device: abs(device.error) - device.actual / 100)
    good = all(device.within for device in found)
    return (
        good,
        f"{title} {worst.device:5} {worst.predicted / MIB:10.2f}"
        f" {worst.actual / MIB:10.2f} {worst.error / MIB:+8.2f}"
        f" {100 * worst.error / max(worst.actual, 1):+7.2f} % {'' if good else '  <--'}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("architectures", nargs="*", choices=[[], *ARCHITECTURES])
    names = parser.parse_args().architectures or list(ARCHITECTURES)
    print(
        f"{'architecture':14} {'model':6} {'run':27} {'worst':5} {'predicted':>10} {'actual':>10} {'off':>8}"
    )
    bad = count = 0
    with llama_run.workers(3) as ready, tempfile.TemporaryDirectory() as folder:
        for good, row in _rows(ready, names, Path(folder)):
            print(row, flush=True)
            count += 1
            bad += not good
    print(f"{count - bad} of {count} loaded, within 1 % or 4 MiB, and at most 1 MiB too little")
    if bad:
        sys.exit(1)


if __name__ == "__main__":
    main()
