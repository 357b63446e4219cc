"""Draining a node: accept no new requests, let running ones finish, let the rest be resumed elsewhere."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from sollold.cluster.gossip.record import GrantState, Record
from sollold.cluster.net.view import View
from sollold.serving.endpoint_server import EndpointServer
from sollold.serving.service import Serving
from sollold.settings.schema import ServingSettings
from sollold.units import seconds_text

log = logging.getLogger("sollold.serving")

_LOOK = 0.1
_MOVING = 5.0
"""Seconds that broken streams get to find another endpoint, for callers of this very node."""


async def drain(
    view: View, server: EndpointServer, serving: Serving, settings: ServingSettings, reason: str
) -> None:
    """Empty this node of requests; returns when it is, or when ``settings.drain_limit`` has passed.

    The record says so at once, so that no node sends requests and the leader places nothing here. Requests
    that wait here are sent elsewhere. Streams that are not done at the limit are aborted in a way that the
    nodes that were asked recover from. Heads that have layers here end their deployments when these are
    idle, or at the same limit. At the end the record says that the node is empty.
    """
    view.update_me(draining=True, empty=False)
    server.refuse(reason)

    def empty() -> bool:
        serving.refuse_waiting()
        return not (server.under_way or serving.under_way or lent(view.me))

    log.info(
        "draining: %d requests running, memory lent to %d deployments of other nodes, limit %s",
        server.under_way,
        lent(view.me),
        seconds_text(settings.drain_limit),
    )
    await _until(empty, settings.drain_limit)
    if not empty():
        log.info("draining: moving %d requests to other nodes", server.under_way)
        server.abort_all(reason)
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
    """Accept requests again. A `drain` under way must have been ended: at its limit it aborts what runs."""
    server.refuse("")
    view.update_me(draining=False, empty=False)
