"""The progress lines and errors of a pull, common to all its sources."""

from __future__ import annotations

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
