"""What every way to get a model tells its caller: lines of progress, or why it can't be had."""

from __future__ import annotations

from typing import Any, Protocol

Progress = dict[str, Any]
"""A line as Ollama's ``/api/pull`` writes it."""


class Say(Protocol):
    """Takes a line of progress."""

    def __call__(self, status: str, **more: Any) -> None:
        """``more``: digest, total and completed, as far as the line is about a file."""
        ...


class PullError(Exception):
    """A model can't be had; the message says why. ``missing``: nobody has it."""

    def __init__(self, message: str, *, missing: bool = False) -> None:
        super().__init__(message)
        self.missing = missing
