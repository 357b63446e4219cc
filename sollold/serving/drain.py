"""Leaving without a loss: take no new work, let what runs finish, then let the rest be resumed elsewhere."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from sollold.cluster.record import GrantState, Record
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
    the nodes asked mend by themselves. Heads that have layers here end their deployments when these are
    idle, or at the same limit. At the end the record says that the node is empty.
    """
    view.update_me(draining=True, empty=False)
    server.refuse(reason)

    def empty() -> bool:
        return not (server.under_way or serving.under_way or lent(view.me))

    log.info(
        "draining: %d requests under way, memory lent to %d deployments of others, up to %s",
        server.under_way,
        lent(view.me),
        seconds_text(settings.drain_limit),
    )
    await _until(empty, settings.drain_limit)
    if not empty():
        log.info("draining: %d requests go on elsewhere", server.under_way)
        server.break_all(reason)
        await _until(empty, _MOVING)
    view.update_me(empty=True)
    log.info("drained")


def lent(me: Record) -> int:
    """How many deployments with another node as head hold memory of this one."""
    committed = (grant for grant in me.grants if grant.state is GrantState.COMMITTED)
    return len({grant.deployment for grant in committed if grant.head != me.node})


async def _until(done: Callable[[], bool], limit: float) -> None:
    for _ in range(max(1, int(limit / _LOOK))):
        if done():
            return
        await asyncio.sleep(_LOOK)


def undrain(view: View, server: EndpointServer) -> None:
    """Take work again. A `drain` under way must have been ended: at its limit it breaks off what runs."""
    server.refuse("")
    view.update_me(draining=False, empty=False)
