"""Parses ``llama-server --list-devices``: the devices that this llama.cpp can use, by its own names."""

from __future__ import annotations

import logging
import os
import re
import subprocess
from pathlib import Path

from sollold.facts import dataclass
from sollold.machine.program import run_program
from sollold.settings.schema import MIB

log = logging.getLogger("sollold.machine")

ENVIRONMENT = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
"""For every child that uses GPUs: ``CUDA<n>`` is then the same GPU as NVML's index n."""
_TIMEOUT = 60.0
_LINE = re.compile(r"^\s+([A-Za-z]+\d*): (.*) \((\d+) MiB, (\d+) MiB free\)\s*$")
_UMA = re.compile(r"ggml_vulkan: (\d+) = .*\| uma: ([01]) ")
_INTEGRATED = re.compile(
    r"Intel.*Graphics|\bIris\b|\bUHD\b|Radeon (?:\S+ )?Graphics|\bApple\b|\bGB10\b|\bOrin\b|\bTegra\b"
)
_CARD = re.compile(r"\bArc\b.* [AB]\d{3}\b")
"""Intel's discrete cards are also named Graphics: ``Intel(R) Arc(TM) A770 Graphics``."""
_SOFTWARE = re.compile(r"llvmpipe|lavapipe|SwiftShader", re.IGNORECASE)
_SELECTION = "GGML_VK_VISIBLE_DEVICES"
"""llama.cpp's variable that selects Vulkan devices by number, and so may enable a software renderer."""
_KINDS = {"cuda": "CUDA", "hip": "ROCm", "vulkan": "Vulkan"}
"""Backend name in llama.cpp's file names → display name."""


@dataclass(frozen=True, slots=True)
class ListedDevice:
    """A device that llama.cpp offers. ``unified``: its memory is the machine's RAM."""

    id: str
    name: str
    total: int
    free: int
    unified: bool


def listed(server: Path) -> list[ListedDevice] | None:
    """Run ``server --list-devices``. Slow if a driver has to start: call it rarely, off the loop.

    Returns None if it can't be run or fails; the log says why.
    """
    try:
        result = run_program([server, "--list-devices"], _TIMEOUT, env=ENVIRONMENT)
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("%s --list-devices failed: %s", server, error)
        return None
    text = result.stdout.decode("utf-8", "replace")
    if result.returncode != 0:
        log.warning("%s --list-devices exited with %d: %s", server, result.returncode, text.strip()[-200:])
        return None
    return parse(text)


def built_for(server: Path) -> tuple[str, ...]:
    """Return the kinds of GPU that this llama.cpp was built for, according to its file names."""
    folder = server.parent
    names = {file.name.removeprefix("libggml-").partition(".")[0] for file in folder.glob("libggml-*.so")}
    names.add(folder.parent.name.rpartition("-")[2])  # `b11434-cuda/bin` in our cache
    return tuple(kind for name, kind in _KINDS.items() if name in names)


def parse(text: str) -> list[ListedDevice]:
    """Return the devices in the output of ``--list-devices``.

    Software renderers are omitted, since they use the CPU, unless the user selected Vulkan devices. So is a
    GPU offered again by a second backend, whose memory would count twice.
    """
    chosen = bool(os.environ.get(_SELECTION))
    uma = {f"Vulkan{number}": shared == "1" for number, shared in _UMA.findall(text)}
    found: list[ListedDevice] = []
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        device, name, total, free = match.groups()
        software = bool(_SOFTWARE.search(name))
        if (software and not chosen) or device.startswith(("CPU", "BLAS", "RPC")):
            continue
        if any(_same_gpu(other, device, name) for other in found):
            continue
        unified = software or uma.get(device, device.startswith(("MTL", "Metal")) or _integrated(name))
        found.append(ListedDevice(device, name, int(total) * MIB, int(free) * MIB, unified))
    return found


def _integrated(name: str) -> bool:
    """Return whether a GPU has no memory of its own, according to its name."""
    return bool(_INTEGRATED.search(name)) and not _CARD.search(name)


def _same_gpu(other: ListedDevice, device: str, name: str) -> bool:
    """Return whether it is ``other`` under another backend; within one backend, equal names are two GPUs."""
    backend = device.rstrip("0123456789")
    return other.id.rstrip("0123456789") != backend and _plain(other.name) == _plain(name)


def _plain(name: str) -> str:
    """Drop what drivers append in parentheses."""
    return re.sub(r"\s*\(.*", "", name).strip().lower()
