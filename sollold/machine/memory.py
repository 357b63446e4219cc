"""The RAM available to this process and its children: the machine's, bounded by its control groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from sollold.facts import dataclass

_LIMITS = ("memory.max", "memory.high")
"""Beyond the second, the system keeps taking memory from the group, which makes its processes very slow."""
_UNLIMITED = 1 << 60
"""cgroup v1 writes a number near 2^63 for no limit."""


@dataclass(frozen=True, slots=True)
class Memory:
    """RAM in bytes.

    ``free`` includes what the system can reclaim from its caches, and so includes ``mapped`` too: pages of
    files mapped by processes, among them weights of models. ``barred``: further free bytes of the machine
    that control groups keep from this process.
    """

    total: int
    free: int
    mapped: int = 0
    barred: int = 0


@dataclass(frozen=True, slots=True)
class _Group:
    """Limit and usage of a control group, in bytes."""

    limit: int
    used: int


def memory(root: Path = Path("/")) -> Memory:
    """Return the RAM of the machine, or of the tightest control group above this process.

    ``root``: the folder that contains ``proc`` and ``sys``.
    """
    system = psutil.virtual_memory()
    return bounded(Memory(system.total, system.available, _mapped(root)), root)


def held_below(root: Path = Path("/")) -> tuple[int, int]:
    """Return (control group limit, machine's RAM) in bytes; zeros without a limit below the RAM."""
    machine = psutil.virtual_memory().total
    limit = min((group.limit for group in _groups(root)), default=machine)
    return (limit, machine) if limit < machine else (0, 0)


def bounded(machine: Memory, root: Path) -> Memory:
    """Bound ``machine`` by the limits of this process's control groups, of either version."""
    total, free = machine.total, machine.free
    for group in _groups(root):
        total = min(total, group.limit)
        free = min(free, max(0, group.limit - group.used))
    free = min(free, total)
    return Memory(total, free, machine.mapped, machine.free - free)


def _mapped(root: Path) -> int:
    """Return the bytes of mapped files; 0 if unknown."""
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            name, _, size = line.partition(":")
            if name == "Mapped":
                return int(size.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return 0


def _groups(root: Path) -> Iterator[_Group]:
    """Yield the limited groups of this process, from its own up to the root of the mount."""
    try:
        lines = (root / "proc/self/cgroup").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return
    mount = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            for base in (mount, mount / "unified"):
                yield from _chain(base, path, _LIMITS, "memory.current", ("inactive_file", "active_file"))
        elif "memory" in controllers.split(","):
            yield from _chain(
                mount / "memory",
                path,
                ("memory.limit_in_bytes",),
                "memory.usage_in_bytes",
                ("total_inactive_file", "total_active_file"),
            )


def _chain(
    base: Path, path: str, limits: Sequence[str], usage: str, cached: tuple[str, str]
) -> Iterator[_Group]:
    folder = base / path.lstrip("/")
    if ".." in path or not folder.is_dir():
        # In a container the path is the host's, while the mount shows the container's own group.
        folder = base
    while folder == base or base in folder.parents:
        group = _group(folder, limits, usage, cached)
        if group is not None:
            yield group
        if folder == base:
            return
        folder = folder.parent


def _group(folder: Path, limits: Sequence[str], usage: str, cached: tuple[str, str]) -> _Group | None:
    try:
        texts = [(folder / limit).read_text().strip() for limit in limits if (folder / limit).exists()]
        maximum = min((_UNLIMITED if text == "max" else int(text) for text in texts), default=_UNLIMITED)
        if maximum >= _UNLIMITED:
            return None
        used = int((folder / usage).read_text())
    except (OSError, ValueError):
        return None
    # File pages, including mapped weights, can be reclaimed and read again.
    return _Group(maximum, max(0, used - sum(_stat(folder, name) for name in cached)))


def _stat(folder: Path, name: str) -> int:
    try:
        for line in (folder / "memory.stat").read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    except (OSError, ValueError):
        pass
    return 0
