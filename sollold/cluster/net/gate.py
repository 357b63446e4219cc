"""What may look at the bytes of a tunnel on their way to the worker, and hold them back for a while."""

from __future__ import annotations

from typing import Protocol


class Gate(Protocol):
    """Looks at what a head says to its worker, and may hold a request back for a while."""

    @property
    def asked(self) -> object | None:
        """The request that is held back."""
        ...

    @property
    def over(self) -> bool:
        """Everything passes from now on."""
        ...

    @property
    def held(self) -> int:
        """Bytes that are held back."""
        ...

    def feed(self, data: bytes) -> bytes:
        """The bytes that may pass now that ``data`` has come."""
        ...

    def release(self) -> bytes:
        """What was held back, as far as it may pass now."""
        ...

    def release_all(self) -> bytes:
        """Hold nothing back any more: all that was."""
        ...

    async def settle(self) -> bytes:
        """Wait until the request that is held back may pass. Never raises.

        Returns:
            What the worker will answer, if that is known: the head need not wait for it. Else nothing.
        """
        ...
