"""Reads files that may block indefinitely: on a share whose server is down, or on a failing disk.

Such a read blocks its thread, for minutes or forever. So it gets its own thread, and callers wait for it
only briefly: in the loop's shared thread pool, a few of them would block all other work there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from sollold.models.stores.threads import in_own_thread

T = TypeVar("T")

PATIENCE = 10.0
"""Timeout of a read that normally takes a moment, in seconds."""


async def read_patiently(work: Callable[[], T], path: str | Path, seconds: float = PATIENCE) -> T:
    """Return the result of ``work``, which blocks while it reads ``path``.

    Raises:
        LookupError: it took longer than ``seconds``; the message names the folder. The read itself continues.
    """
    try:
        async with asyncio.timeout(seconds):
            return await asyncio.shield(in_own_thread(work, name=f"read {path}"))
    except TimeoutError:
        raise LookupError(no_answer(Path(path).parent)) from None


def no_answer(place: str | Path, effect: str = "") -> str:
    """Return a message that a folder does not respond, followed by ``effect``."""
    return f"{place} does not answer{effect}; is it on a network share whose server is down or unreachable?"
