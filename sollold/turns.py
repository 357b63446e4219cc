"""The pauses of loops. All of one period run at the same moment, so an idle daemon wakes up once; others end
early when an event is set."""

from __future__ import annotations

import asyncio
import contextlib
from math import floor


async def next_turn(seconds: float) -> None:
    """Sleep until the loop's clock shows a multiple of ``seconds``: between 0.5 and 1.5 periods."""
    await asyncio.sleep(pause(asyncio.get_running_loop().time(), seconds))


def pause(now: float, seconds: float) -> float:
    """Return the time to the next multiple of ``seconds`` at least half of it away: timers may be early."""
    return (floor(now / seconds + 0.5) + 1) * seconds - now


async def sleep_until_set(event: asyncio.Event, seconds: float | None) -> None:
    """Sleep until ``event`` is set, ``seconds`` at most; None: no limit."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
