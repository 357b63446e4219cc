"""Ends of tasks."""

from __future__ import annotations

import asyncio
from typing import Any


async def cancel_and_wait(*tasks: asyncio.Future[Any] | None) -> None:
    """Cancel all of ``tasks`` that are there and wait until they have ended, however they do."""
    there = [task for task in tasks if task is not None]
    for task in there:
        task.cancel()
    await asyncio.gather(*there, return_exceptions=True)


def retrieve_error(task: asyncio.Future[Any]) -> None:
    """Retrieve the error of a task that ended, for when nobody waits for it any more."""
    if not task.cancelled():
        task.exception()
