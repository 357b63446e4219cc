"""The time limits of one request, over its attempts at several nodes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import Any, TypeVar

from sollold.client.errors import RequestTimeout

_GRACE_SECONDS = 1.0
"""Extra seconds for the client's own timeout: the daemon enforces the limit first, with a better message."""

T = TypeVar("T")


class TimeLimits:
    """The time limits of one request, in seconds."""

    def __init__(self, began: float, timeout: float | None, start: float | None) -> None:
        """``began``: start of the request; ``start``: limit until the answer begins, counted from now."""
        self._began = began
        self._timeout = timeout
        self._start = start
        self._started = start is None
        self._waiting_since = time.monotonic()
        self._waited = 0.0
        self._counts = True

    def elapsed(self) -> float:
        """Seconds since the start of the request."""
        return time.monotonic() - self._began

    def body(self) -> dict[str, Any]:
        """The limits as fields of the request."""
        if self._timeout is None:
            return {}
        return {"timeout": max(0.001, self._began + self._timeout - time.monotonic())}

    def waits(self, text: str) -> None:
        """Note the reason for waiting: time in a queue does not count towards the start."""
        now = time.monotonic()
        if self._counts:
            self._waited += now - self._waiting_since
        self._waiting_since = now
        self._counts = not text.startswith("queued")

    def started(self) -> None:
        """Note that the answer has begun."""
        self._started = True

    async def within(self, step: Awaitable[T]) -> T:
        """Await ``step`` within the limits.

        Raises:
            RequestTimeout: it takes too long.
        """
        now = time.monotonic()
        total = None if self._timeout is None else self._began + self._timeout + _GRACE_SECONDS
        start = None
        if not self._started and self._counts and self._start is not None:
            start = self._waiting_since + self._start - self._waited
        ends = [end for end in (total, start) if end is not None]
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
