"""Reads buffer sizes from llama-server's log (``-lv 4``)."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

_BUFFER = re.compile(
    r"(?P<device>[A-Za-z][\w.:\[\]-]*?)\s+(?P<kind>model|LoRA|KV|RS|compute|output) buffer size"
    r" =\s*(?P<mib>[\d.]+) MiB"
)
_GROWN = re.compile(r"(?P<device>\S+)\s+compute buffer size of\s+(?P<mib>[\d.]+) MiB, does not match")
_ENDPOINT = re.compile(r"RPC\d+\[(?P<endpoint>[^\]]+)\]")
_CHECKPOINT = re.compile(r"created context checkpoint.*size = (?P<mib>[\d.]+) MiB")


@dataclass(frozen=True, slots=True)
class Buffers:
    """Bytes of one device's buffers according to the log (rounded to a hundredth of a MiB)."""

    model: int = 0
    state: int = 0
    compute: int = 0
    output: int = 0

    @property
    def total(self) -> int:
        return self.model + self.state + self.compute


def buffers(log: str, endpoints: list[str]) -> dict[str, Buffers]:
    """Buffers by device: ``RPC<n>`` for the n-th of the endpoints (``host:port``), ``CPU`` for the rest.

    Includes the buffers of an MTP draft context.
    """
    first, _, second = log.partition("creating MTP draft context")
    second, _, end = second.partition("~llama_context")
    found = _of_context(first, endpoints)
    for match in _GROWN.finditer(end):
        device = _device(match["device"], endpoints)
        found[device] = replace(found[device], compute=round(float(match["mib"]) * 1024 * 1024))
    for device, more in _of_context(second, endpoints).items():
        main = found.get(device, Buffers())
        found[device] = replace(main, state=main.state + more.state, compute=main.compute + more.compute)
    return found


def _device(name: str, endpoints: list[str]) -> str:
    endpoint = _ENDPOINT.match(name)
    return f"RPC{endpoints.index(endpoint['endpoint'])}" if endpoint else "CPU"


def _of_context(log: str, endpoints: list[str]) -> dict[str, Buffers]:
    found: dict[str, Buffers] = {}
    for match in _BUFFER.finditer(log):
        device = _device(match["device"], endpoints)
        size = round(float(match["mib"]) * 1024 * 1024)
        kind = {"KV": "state", "RS": "state", "LoRA": "model"}.get(match["kind"], match["kind"])
        before = found.get(device, Buffers())
        # The compute buffer is allocated again when adapters are loaded.
        size = max(size, before.compute) if kind == "compute" else size + getattr(before, kind)
        found[device] = replace(before, **{kind: size})
    return found


def projector(log: str) -> tuple[str, int]:
    """The device of the projector and the bytes of its tensors; empty and 0 if there is none."""
    device = re.search(r"CLIP using (\S+) backend", log)
    size = re.search(r"load_hparams: model size:\s+([\d.]+) MiB", log)
    return device[1] if device else "", round(float(size[1]) * 1024 * 1024) if size else 0


def projector_compute(log: str) -> int:
    """Bytes of the projector's compute buffer, reserved when it is loaded; 0 without a warmup."""
    size = re.search(r"reserve_compute_meta: +\S+ compute buffer size = +([\d.]+) MiB", log)
    return round(float(size[1]) * 1024 * 1024) if size else 0


def checkpoints(log: str) -> list[int]:
    """Bytes of each checkpoint that a slot created. Needs ``-lv 4``."""
    return [round(float(match["mib"]) * 1024 * 1024) for match in _CHECKPOINT.finditer(log)]
