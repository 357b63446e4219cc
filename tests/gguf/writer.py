"""Writes GGUF files of any architecture with random weights.

``python -m tests.gguf.writer OUT.gguf --arch llama --layers 16 --bytes 0.8e9 --type q8_0``
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

from sollold.models.gguf import writer
from sollold.models.gguf.writer import MetadataValue, NewTensor
from tests.gguf import weights
from tests.gguf.architectures import WRITABLE
from tests.gguf.size import Size
from tests.gguf.tokenizer import SMALLEST, TEMPLATES, tokenizer

_KEPT_F32 = (
    "norm",
    "ffn_gate_inp",
    "ssm_",
    "time_mix",
    "channel_mix",
    "shortconv.conv",
    "sinks",
    "altup",
    "rope_",
)


def write(
    path: Path | str,
    architecture: str = "llama",
    size: Size | None = None,
    *,
    kind: str = "q8_0",
    template: str = "plain",
    seed: int = 1,
    more: dict[str, MetadataValue] | None = None,
    tensors: Sequence[tuple[str, tuple[int, ...]]] = (),
) -> Path:
    """Write a model.

    Args:
        path: the file.
        architecture: a key of `WRITABLE`.
        size: the model's dimensions; None: the defaults.
        kind: type of the matrices, a key of `weights.TYPES`.
        template: the chat template, a key of `TEMPLATES`.
        seed: of the random weights.
        more: metadata that is added or replaced.
        tensors: names and shapes of further tensors.
    """
    size = size or Size()
    known = WRITABLE[architecture]
    metadata: dict[str, MetadataValue] = {
        "general.architecture": known.name,
        # Not the architecture's name: for some names llama.cpp changes the tokenizer.
        "general.name": "random",
    }
    metadata |= {f"{known.name}.{key}": value for key, value in (known.metadata(size) | size.more).items()}
    metadata |= tokenizer(size.vocab, template)
    if "token_types.weight" in {name for name, _ in known.tensors(size)}:
        metadata["tokenizer.ggml.token_type_count"] = 2
    metadata |= more or {}
    added = [_tensor(name, shape, kind, seed) for name, shape in tensors]
    writer.write(path, metadata, [*tensors_of(architecture, size, kind, seed), *added])
    return Path(path)


def tensors_of(architecture: str, size: Size, kind: str = "q8_0", seed: int = 1) -> list[NewTensor]:
    """The tensors of a model, with random data."""
    listed = list(WRITABLE[architecture].tensors(size))
    output = "output.weight" if any(name == "output.weight" for name, _ in listed) else "token_embd.weight"
    return [_tensor(*item, kind, seed, output) for item in listed]


def _tensor(
    name: str, shape: tuple[int, ...], kind: str, seed: int = 1, output: str = "output.weight"
) -> NewTensor:
    number = weights.TYPES[kind]
    if len(shape) == 1 or name.endswith(".bias") or any(part in name for part in _KEPT_F32):
        number = weights.F32
    elif kind == "mxfp4" and "_exps" not in name:
        number = weights.Q8_0
    quiet = SMALLEST if name == output else 0
    data = functools.partial(weights.data, name, shape, number, seed, quiet)
    return NewTensor(name, shape, number, data)


def sized(architecture: str, wanted: float, size: Size, kind: str = "q8_0") -> Size:
    """``size`` with the feed-forward length changed so that the tensors have about ``wanted`` bytes."""

    def total(hidden: int) -> int:
        resized = dataclasses.replace(size, ff=hidden)
        tensors = WRITABLE[architecture].tensors(resized)
        return sum(_tensor(name, shape, kind).size for name, shape in tensors)

    step = 256
    per_step = (total(2 * step) - total(step)) or 1
    hidden = max(1, round((wanted - total(step)) / per_step) + 1) * step
    return dataclasses.replace(size, ff=hidden)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--arch", default="llama", choices=sorted(WRITABLE))
    parser.add_argument("--type", default="q8_0", choices=sorted(weights.TYPES))
    parser.add_argument("--template", default="plain", choices=sorted(TEMPLATES))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bytes", type=float, default=0.0, help="approximate size of the file; sets --ff")
    for item in dataclasses.fields(Size):
        if isinstance(item.default, int) and not isinstance(item.default, bool):
            parser.add_argument(f"--{item.name.replace('_', '-')}", type=int, default=item.default)
    parser.add_argument("--tied", action="store_true")
    options = vars(parser.parse_args())
    size = Size(
        **{item.name: options[item.name] for item in dataclasses.fields(Size) if item.name in options}
    )
    if options["bytes"]:
        size = sized(options["arch"], options["bytes"], size, options["type"])
    write(
        options["out"],
        options["arch"],
        size,
        kind=options["type"],
        template=options["template"],
        seed=options["seed"],
    )


if __name__ == "__main__":
    main()
