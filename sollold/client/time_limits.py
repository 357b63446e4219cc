"""The time limits of one request, kept while it is asked of one node after another."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import Any, TypeVar

from sollold.client.errors import RequestTimeout

_GRACE_SECONDS = 1.0
"""The daemon keeps the time limit itself and says so in its words; the client waits a little longer."""

T = TypeVar("T")


class TimeLimits:
    """The time limits of one request. Seconds."""

    def __init__(self, began: float, timeout: float | None, start: float | None) -> None:
        """``began``: when the request was made; ``start``: counts from now on."""
        self._began = began
        self._timeout = timeout
        self._start = start
        self._started = start is None
        self._waiting_since = time.monotonic()
        self._waited = 0.0
        self._counts = True

    def elapsed(self) -> float:
        """Seconds since the request was made."""
        return time.monotonic() - self._began

    def body(self) -> dict[str, Any]:
        """What the daemon is told of them."""
        if self._timeout is None:
            return {}
        return {"timeout": max(0.001, self._began + self._timeout - time.monotonic())}

    def waits(self, text: str) -> None:
        """What is waited for: the time in a queue does not count as that of a start."""
        now = time.monotonic()
        if self._counts:
            self._waited += now - self._waiting_since
        self._waiting_since = now
        self._counts = not text.startswith("queued")

    def started(self) -> None:
        """The answer has begun."""
        self._started = True

    async def within(self, step: Awaitable[T]) -> T:
        """The result of ``step``, if it comes in time.

        Raises:
            RequestTimeout: it does not.
        """
        now = time.monotonic()
        whole = None if self._timeout is None else self._began + self._timeout + _GRACE_SECONDS
        start = None
        if not self._started and self._counts and self._start is not None:
            start = self._waiting_since + self._start - self._waited
        ends = [end for end in (whole, start) if end is not None]
        if not ends:
            return await step
        try:
            async with asyncio.timeout(min(ends) - now):
                return await step
        except TimeoutError as error:
            if isinstance(error, RequestTimeout):
                raise
            if start is not None and start == min(ends):
                raise RequestTimeout(
                    f"the coordinator did not start within {self._start:g} s (coordinator_timeout)"
                ) from None
            raise RequestTimeout(f"request timeout after {self._timeout:g} s") from None
