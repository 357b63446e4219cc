"""Helpers for starting and ending tasks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

log = logging.getLogger("sollold")


def start_task(
    tasks: set[asyncio.Task[T]], work: Coroutine[Any, Any, T], name: str | None = None
) -> asyncio.Task[T]:
    """Run ``work`` in a task that is in ``tasks`` until it has ended: the loop keeps no reference to it."""
    task = asyncio.create_task(work, name=name)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task


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


def log_failure(task: asyncio.Task[Any]) -> None:
    """Log the error of a task that ended by one."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("%s ended by an internal error", task.get_name(), exc_info=error)
