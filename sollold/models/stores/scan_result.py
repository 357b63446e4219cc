"""What a store says of a model before any GGUF header is read, and how a store's change is noticed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import field, replace
from pathlib import Path

from sollold.facts import dataclass

Stamp = tuple[int, int, int, int] | None
"""Device, inode, size and modification time (ns) of a path; None when it is not there."""
Watched = tuple[tuple[int, int, int, int], int, int, int] | None
"""Its stamp, mode, owner and group."""


def stamp(path: str | Path) -> Stamp:
    """The stamp of a path, symlinks followed. Never raises `OSError`."""
    try:
        status = Path(path).stat()
    except (OSError, ValueError):
        return None
    return stamp_of(status)


def stamp_of(status: os.stat_result) -> tuple[int, int, int, int]:
    """The stamp of what is there."""
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _watched(path: str | Path) -> Watched:
    """What is compared of a path: who may read it as well, which changes no time of it."""
    try:
        status = Path(path).stat()
    except (OSError, ValueError):
        return None
    return (stamp_of(status), status.st_mode, status.st_uid, status.st_gid)


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A model as a store lists it. Fields as in `sollold.models.model.Model`.

    ``files``: the GGUF shards, first shard first; for Ollama's split blobs in the manifest's order.
    ``manifest``: hex sha256 of Ollama's manifest; ``format``: ``gguf``, ``safetensors``, ``cloud``.
    """

    name: str
    source: str
    files: tuple[str, ...] = ()
    projector: str = ""
    adapters: tuple[str, ...] = ()
    modified: float = 0.0
    size: int = 0
    template: str = ""
    system: str = ""
    messages: tuple[tuple[str, str], ...] = ()
    params: str = "{}"
    license: str = ""
    manifest: str = ""
    parent: str = ""
    format: str = "gguf"
    architecture: str = ""
    quantization: str = ""
    context_train: int = 0
    capabilities: tuple[str, ...] = ()
    unusable: str = ""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that keeps models from being seen: what, and how to fix it."""

    what: str
    fix: str = ""


@dataclass(slots=True)
class Scan:
    """What one look at the stores gave. ``watch``: the paths whose change means to look again."""

    found: list[FoundModel] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    watch: dict[str, Watched] = field(default_factory=dict)

    def see(self, path: str | Path) -> None:
        """Watch a path from now on."""
        self.watch[str(path)] = _watched(path)

    def see_files(self, files: Iterable[Path], projector: Path | None) -> None:
        """Watch a model's files."""
        for path in files:
            self.see(path)
        if projector is not None:
            self.see(projector)

    def changed(self) -> bool:
        """Whether any watched path is not as it was. One ``stat`` a path."""
        return any(_watched(path) != was for path, was in self.watch.items())


def unreadable(found: FoundModel, reason: str) -> FoundModel:
    """The same model, marked as not to be run."""
    return found if found.unusable else replace(found, unusable=reason)
