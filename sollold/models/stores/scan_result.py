"""The listing of a store before any GGUF header is read, and the detection of changes to it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import field, replace
from pathlib import Path

from sollold.facts import dataclass

Stamp = tuple[int, int, int, int] | None
"""Device, inode, size and modification time (ns) of a path; None if it does not exist."""
Watched = tuple[tuple[int, int, int, int], int, int, int] | None
"""Stamp, mode, owner and group of a path."""


def stamp(path: str | Path) -> Stamp:
    """Return the stamp of a path, following symlinks. Never raises `OSError`."""
    try:
        status = Path(path).stat()
    except (OSError, ValueError):
        return None
    return stamp_of(status)


def stamp_of(status: os.stat_result) -> tuple[int, int, int, int]:
    """Return the stamp of a status."""
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _watched(path: str | Path) -> Watched:
    """Return what is compared of a watched path: permissions too, since the stamp does not show them."""
    try:
        status = Path(path).stat()
    except (OSError, ValueError):
        return None
    return (stamp_of(status), status.st_mode, status.st_uid, status.st_gid)


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A model as listed by a store. Fields as in `sollold.models.model.Model`.

    ``files``: the GGUF shards in order; for Ollama's split blobs in the manifest's order. ``manifest``: hex
    sha256 of Ollama's manifest; ``format``: ``gguf``, ``safetensors``, ``cloud``.
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
    named: bool = False
    version: str = ""


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem to report: what is wrong, and how to fix it."""

    what: str
    fix: str = ""


@dataclass(slots=True)
class Scan:
    """The result of scanning a store. ``watch``: the paths whose change makes another scan necessary."""

    found: list[FoundModel] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    watch: dict[str, Watched] = field(default_factory=dict)

    def see(self, path: str | Path) -> None:
        """Watch a path."""
        self.watch[str(path)] = _watched(path)

    def see_files(self, files: Iterable[Path], projector: Path | None) -> None:
        """Watch a model's files."""
        for path in files:
            self.see(path)
        if projector is not None:
            self.see(projector)

    def changed(self) -> bool:
        """Return whether any watched path has changed. One ``stat`` per path."""
        return any(_watched(path) != previous for path, previous in self.watch.items())


def unreadable(found: FoundModel, reason: str) -> FoundModel:
    """Return the model marked as unusable, unless it already is."""
    return found if found.unusable else replace(found, unusable=reason)
