"""Leaving without a loss: take no new work, let what runs finish, then let the rest be resumed elsewhere."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from sollold.cluster.view import View
from sollold.config import ServingSettings
from sollold.serving.endpoint_server import EndpointServer
from sollold.units import seconds_text

log = logging.getLogger("sollold.serving")

_LOOK = 0.1
_MOVING = 5.0
"""Seconds that broken streams get to find another endpoint, for callers of this very node."""


class Answering(Protocol):
    """Callers of this node that are being answered."""

    @property
    def under_way(self) -> int:
        """How many."""
        ...


async def drain(
    view: View, server: EndpointServer, serving: Answering, settings: ServingSettings, reason: str
) -> None:
    """Empty this node of requests; returns when it is, or when ``settings.drain_limit`` has passed.

    The record says so at once, so that no node sends new work and the leader places nothing here. Requests
    in line here are sent elsewhere. Streams that are not done at the limit are broken off in the way that
    the nodes asked mend by themselves.
    """
    view.update_me(draining=True)
    server.refuse(reason)
    log.info(
        "draining: %d requests under way, up to %s", server.under_way, seconds_text(settings.drain_limit)
    )
    await _until(lambda: not (server.under_way or serving.under_way), settings.drain_limit)
    if server.under_way:
        log.info("draining: %d requests go on elsewhere", server.under_way)
        server.break_all(reason)
        await _until(lambda: not (server.under_way or serving.under_way), _MOVING)


async def _until(done: Callable[[], bool], limit: float) -> None:
    for _ in range(max(1, int(limit / _LOOK))):
        if done():
            return
        await asyncio.sleep(_LOOK)


def undrain(view: View, server: EndpointServer) -> None:
    """Take work again."""
    server.refuse("")
    view.update_me(draining=False)
