"""A search for an engine that can be stopped from outside with an error."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from sollold.errors import Refusal
from sollold.serving.attempts import Attempt

_Found = TypeVar("_Found", Attempt, Attempt | None)


class StoppableSearch:
    """The searches for an engine of one request, one at a time.

    Attributes:
        stopped: the error with which the request was stopped; None if it was not.
    """

    def __init__(self, release: Callable[[Attempt, None], Awaitable[None]]) -> None:
        """``release`` closes an attempt that was found too late."""
        self._release = release
        self.stopped: Refusal | None = None
        self._task: asyncio.Task[Any] | None = None
        """The task that is searching, initially or after a fault."""

    def stop(self, refusal: Refusal) -> None:
        """Let the current search, if any, and `check` raise ``refusal``."""
        first, self.stopped = self.stopped is None, refusal
        if first:
            self.cancel()

    def cancel(self) -> None:
        """Cancel the task that is searching, if any."""
        if self._task is not None:
            self._task.cancel()

    def check(self) -> None:
        """Raise the error with which the request was stopped, if it was.

        Raises:
            Refusal: it was.
        """
        if self.stopped is not None:
            raise self.stopped

    async def run(self, find: Coroutine[Any, Any, _Found]) -> _Found:
        """Return the result of ``find``, unless the request is stopped meanwhile.

        Raises:
            Refusal: as its fault says.
        """
        task = self._task = asyncio.current_task()
        assert task is not None
        cancellations = task.cancelling()
        try:
            attempt = await find
        except asyncio.CancelledError:
            # As in `asyncio.timeout`: `stop` made the only cancellation.
            if self.stopped is not None and task.uncancel() <= cancellations:
                raise self.stopped from None
            raise
        finally:
            self._task = None
        if self.stopped is not None and attempt is not None:
            await self._release(attempt, None)
        self.check()
        return attempt
