"""Helpers for ending tasks."""

from __future__ import annotations

import asyncio
from typing import Any


async def cancel_and_wait(*tasks: asyncio.Future[Any] | None) -> None:
    """Cancel ``tasks`` (None is ignored) and wait until all have ended. Their errors are ignored."""
    pending = [task for task in tasks if task is not None]
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)


def retrieve_error(task: asyncio.Future[Any]) -> None:
    """Retrieve the error of a task that ended, so that asyncio does not log it."""
    if not task.cancelled():
        task.exception()
