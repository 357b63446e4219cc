"""Work that is done every so often, by all at the same moment: an idle daemon wakes up once for it."""

from __future__ import annotations

import asyncio
from math import floor


async def next_turn(seconds: float) -> None:
    """Sleep until the clock of the loop shows a multiple of ``seconds``: half of these to one and a half."""
    await asyncio.sleep(pause(asyncio.get_running_loop().time(), seconds))


def pause(now: float, seconds: float) -> float:
    """Until the next multiple of ``seconds`` that is not nearer than half of them: timers may be early."""
    return (floor(now / seconds + 0.5) + 1) * seconds - now
