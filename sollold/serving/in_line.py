"""Requests of this node that stand in lines: where there is room, the oldest of another line hears of it."""

from __future__ import annotations

import asyncio


class InLine:
    """Who stands where, in the order of coming."""

    def __init__(self) -> None:
        self._nudges: dict[asyncio.Future[None], tuple[str, str]] = {}

    def stand(self, endpoint: tuple[str, str]) -> asyncio.Future[None]:
        """A request stands in ``endpoint``'s line. The answer is done when it should look elsewhere."""
        nudge: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._nudges[nudge] = endpoint
        return nudge

    def leave(self, nudge: asyncio.Future[None]) -> None:
        """It stands there no more."""
        self._nudges.pop(nudge, None)

    def freed(self, endpoint: tuple[str, str]) -> None:
        """A request at ``endpoint`` is over."""
        for nudge, stands_at in self._nudges.items():
            if stands_at != endpoint:
                del self._nudges[nudge]
                if not nudge.done():
                    nudge.set_result(None)
                    return
                break
