"""Samples of a daemon's resources, and checks of their growth."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from sollold.engines.llamacpp.process_log import KEEP_DEPLOYMENTS, ROTATE_BYTES
from tests.daemons import Node

GROWTH = 0.05
"""Fraction by which a quantity may grow."""
SLACK = {"memory": 2.0, "descriptors": 2.0, "threads": 2.0, "tasks": 2.0, "files": 2.0}
"""Absolute growth that is always allowed, since 5 % of a small number is below one. Units as in `Sample`."""
LOG_LIMIT = 2 * ROTATE_BYTES / 1e6
"""MB of logs that a deployment may have: the current and the previous file of each of its processes."""
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class Sample:
    """One daemon. ``memory``: resident MB. ``files``: number of files in its state and cache folders, without
    cached tensors and logs of ended engines, which have limits of their own. ``deployments``: number of
    deployments with logs. ``logs``: MB of these logs.
    """

    memory: float
    descriptors: float
    threads: float
    tasks: float
    files: float
    deployments: float
    logs: float


NAMES = tuple(field.name for field in fields(Sample))


def take(node: Node) -> Sample:
    """Take a sample of a running daemon.

    Raises:
        OSError, AssertionError: the daemon does not run or does not answer.
    """
    assert node.process is not None
    own = Path(f"/proc/{node.process.pid}")
    status = dict(line.split(":", 1) for line in (own / "status").read_text().splitlines() if ":" in line)
    shown = node.ask("GET", "/metrics").body.decode()
    tasks = next(float(line.split()[1]) for line in shown.splitlines() if line.startswith("sollold_tasks "))
    files = _files(node)
    return Sample(
        memory=int(status["VmRSS"].split()[0]) / 1024,
        descriptors=len(list((own / "fd").iterdir())),
        threads=int(status["Threads"]),
        tasks=tasks,
        files=sum(file.parts[-3] != "logs" for file in files),
        deployments=len({file.parent for file in files if file.parts[-3] == "logs"}),
        logs=sum(_size(file) for file in files if file.parts[-3] == "logs") / 1e6,
    )


def _files(node: Node) -> list[Path]:
    found = []
    for folder in ("state", "cache"):
        with contextlib.suppress(FileNotFoundError):
            found += [file for file in (node.folder / folder).rglob("*") if file.is_file()]
    kept = node.folder / "cache" / "tensors" / "whole"
    return [file for file in found if file.parent != kept]


def _size(file: Path) -> int:
    with contextlib.suppress(OSError):
        return file.stat().st_size
    return 0


def median_sample(samples: Sequence[Sample]) -> Sample:
    """Return the median of each quantity."""
    return Sample(*(statistics.median(column) for column in zip(*map(astuple, samples), strict=True)))


def grown(name: str, first: Sample, last: Sample) -> list[str]:
    """Describe the quantities that grew too much on node ``name``."""
    found = [
        f"{name}: {quantity} went from {before:.1f} to {after:.1f}"
        for quantity, before, after in zip(NAMES, astuple(first), astuple(last), strict=True)
        if quantity in SLACK and after > before + max(before * GROWTH, SLACK[quantity])
    ]
    # The last ended deployment is removed only when the next one ends.
    if last.deployments > KEEP_DEPLOYMENTS + 1 or last.logs > last.deployments * LOG_LIMIT:
        found.append(f"{name}: {last.logs:.1f} MB of logs of {last.deployments:.0f} deployments are kept")
    return found


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """Return a sparkline of the values with their minimum and maximum."""
    if not values:
        return ""
    step = max(1, -(-len(values) // width))
    seen = [max(values[start : start + step]) for start in range(0, len(values), step)]
    least, most = min(seen), max(seen)
    span = (most - least) or 1.0
    bars = "".join(_BARS[int((value - least) / span * (len(_BARS) - 1))] for value in seen)
    return f"{bars}  {least:.1f} to {most:.1f}"
