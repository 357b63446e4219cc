"""What serving needs of the engines on this machine: the contract, which the agent fulfils."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol


class Engines(Protocol):
    """This node's engines, by the ids of its endpoints. Nothing here waits."""

    def url(self, endpoint: str) -> str | None:
        """Where the engine listens (``http://127.0.0.1:18080``); None when there is none that answers."""
        ...

    def busy(self, endpoint: str, keep_alive: float | None) -> AbstractContextManager[None]:
        """While inside, a request is in the line or the engine: the endpoint is not idle.

        ``keep_alive``: seconds of idleness that the caller wants after it; None: as it was.
        """
        ...

    def fail(self, endpoint: str, reason: str) -> None:
        """The engine hangs, although its process lives: end what is left and say so in the record."""
        ...

    def report(self, endpoint: str, active: int, waiting: int, speed: float) -> None:
        """Counts for the record; ``speed`` in tokens per second of a single stream, 0.0 when unknown."""
        ...
