"""Drains a node: refuses new requests, lets running ones finish, and has the rest resumed elsewhere."""

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

_CHECK_SECONDS = 0.1
_MOVE_SECONDS = 5.0
"""Seconds granted to aborted streams of this node's own callers to find another endpoint."""


async def drain(
    view: View, server: EndpointServer, serving: Serving, settings: ServingSettings, reason: str
) -> None:
    """Empty this node of requests. Takes at most ``settings.drain_limit`` and `_MOVE_SECONDS` seconds.

    The record announces it at once, so that no node sends requests and the leader places nothing here.
    Queued requests are sent elsewhere. Streams still running at the limit are aborted in a way that the nodes
    of their callers recover from. Heads with layers here end their deployments when idle, or at the same
    limit. Finally the record marks the node as empty, even if something is left.
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
    await _wait_until(empty, settings.drain_limit)
    if not empty():
        log.info("draining: moving %d requests to other nodes", server.under_way)
        server.abort_all(reason)
        await _wait_until(empty, _MOVE_SECONDS)
    view.update_me(empty=True)
    log.info("drained")


def lent(me: Record) -> int:
    """Number of deployments with another node as head that hold memory of this one."""
    committed = (grant for grant in me.grants if grant.state is GrantState.COMMITTED)
    return len({grant.deployment for grant in committed if grant.head != me.node})


async def _wait_until(done: Callable[[], bool], limit: float) -> None:
    for _ in range(max(1, int(limit / _CHECK_SECONDS))):
        if done():
            return
        await asyncio.sleep(_CHECK_SECONDS)


def undrain(view: View, server: EndpointServer) -> None:
    """Accept requests again. Cancel a running `drain` first, since at its limit it aborts requests."""
    server.refuse("")
    view.update_me(draining=False, empty=False)
