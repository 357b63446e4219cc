"""Protocol of an object that inspects a tunnel's bytes on their way to the worker and may hold them back."""

from __future__ import annotations

from typing import Protocol


class Gate(Protocol):
    """Inspects the bytes that a head sends to its worker, and may hold a request back for a while."""

    @property
    def asked(self) -> object | None:
        """The request that is held back, if any."""
        ...

    @property
    def over(self) -> bool:
        """Whether everything passes from now on."""
        ...

    @property
    def held(self) -> int:
        """Number of bytes that are held back."""
        ...

    def feed(self, data: bytes) -> bytes:
        """Add received bytes; return those that may pass now."""
        ...

    def release(self) -> bytes:
        """Return the held bytes that may pass now."""
        ...

    def release_all(self) -> bytes:
        """Stop holding back; return all held bytes."""
        ...

    async def settle(self) -> bytes:
        """Wait until the request that is held back may pass. Never raises.

        Returns:
            The worker's expected response if it is known, so that the head need not wait for it; else empty.
        """
        ...
