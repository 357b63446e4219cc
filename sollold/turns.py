"""Aligned periodic work: all loops of one period run at the same moment, so an idle daemon wakes up once."""

from __future__ import annotations

import asyncio
from math import floor


async def next_turn(seconds: float) -> None:
    """Sleep until the loop's clock shows a multiple of ``seconds``: between 0.5 and 1.5 periods."""
    await asyncio.sleep(pause(asyncio.get_running_loop().time(), seconds))


def pause(now: float, seconds: float) -> float:
    """Return the time to the next multiple of ``seconds`` at least half of it away: timers may be early."""
    return (floor(now / seconds + 0.5) + 1) * seconds - now
