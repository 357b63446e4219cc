"""The progress lines and errors of a pull, common to all its sources."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

Progress = dict[str, Any]
"""A line in the format of Ollama's ``/api/pull``."""


class Say(Protocol):
    """Receives a line of progress."""

    def __call__(self, status: str, **more: Any) -> None:
        """``more``: digest, total and completed, if the line is about a file."""
        ...


class PullError(Exception):
    """A model can't be pulled; the message says why. ``missing``: no source has it."""

    def __init__(self, message: str, *, missing: bool = False) -> None:
        super().__init__(message)
        self.missing = missing


class RunningPull:
    """One pull under way, watched by any number of callers; it is cancelled when the last of them leaves."""

    def __init__(self) -> None:
        self.nodes_only = True
        """Whether all watchers want it from nodes only."""
        self.insecure = False
        self.lines: dict[str, Progress] = {}
        self.changed = asyncio.Event()
        self.watchers = 0
        self.left = False
        """Whether all watchers have left, so that it is being cancelled."""
        self.ended = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    def say(self, status: str, **more: Any) -> None:
        """Report a line of progress; it replaces an earlier one with the same digest or status."""
        self.lines[str(more.get("digest", status))] = {"status": status, **more}
        self.changed.set()
