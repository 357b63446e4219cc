"""Endpoints for monitoring: events, history, requests, health, targets for Prometheus."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from functools import partial
from typing import Any

import msgspec
from aiohttp import web

from sollold.api.http.access import ACCESS, client_of
from sollold.api.http.body import as_type, read_object
from sollold.api.http.inflight import InflightRequests
from sollold.api.http.response import JSON, SSE, json_response
from sollold.api.http.route import Route, integer_of
from sollold.api.http.services import AppServices
from sollold.control.events import Event, as_object
from sollold.control.history import FIRST_TOKEN, TOTALS, HistoryRequest, NodeHistory, bounded_request, totals
from sollold.errors import Fault, Refusal, bad_request
from sollold.natural_order import natural
from sollold.tasks import retrieve_error

_DEFAULT_EVENTS = 100
_PING_SECONDS = 15.0
"""Seconds without an event after which a comment is sent, so that a dead connection is noticed."""
_MAX_FOLLOWERS = 64
_MAX_FOLLOWERS_EACH = 16
"""Maximum number of event streams per caller, so that others can follow too."""
_DIGITS = 4
_MAX_ID_DIGITS = 16
"""Maximum number of digits of an event's id, which is in microseconds since the epoch."""


class ForgetBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``POST /api/cluster/forget``. ``node``: id or name of a missing node."""

    node: str = ""


class MonitorRoutes:
    """The handlers of the monitoring endpoints."""

    def __init__(self, services: AppServices, inflight: InflightRequests) -> None:
        self._services = services
        self._inflight = inflight
        self._followers: Counter[str] = Counter()
        """Number of open event streams by caller."""
        self._gathering = asyncio.Lock()
        """Limits histories, of megabytes from every node, to one at a time."""
        self._histories: dict[HistoryRequest, asyncio.Task[bytes]] = {}
        """Those being gathered: equal requests share one, since a silent node delays each by seconds."""

    def routes(self) -> list[Route]:
        """Return the route table."""
        get, post = partial(Route, "GET"), partial(Route, "POST")
        return [
            get(
                "/api/cluster/events",
                self._events,
                "Events: joins, losses, elections, loads, resumed answers, drains (server-sent events)",
                produces=("text/event-stream",),
                query=(
                    ("last", f"Number of past events to begin with; default {_DEFAULT_EVENTS}"),
                    (
                        "after",
                        "Only events with a higher id; ids increase across restarts; overrides `last`",
                    ),
                    (
                        "follow",
                        "1, or without a value: continue with new events; omitted: end after past ones",
                    ),
                ),
            ),
            get(
                "/api/cluster/history",
                self._history,
                "Tokens, requests, queue, first-token time and memory: the last hour by seconds, "
                "the last day by minutes",
                query=(
                    ("seconds", "How far back, at most a day; default 600"),
                    ("step", "Seconds per point; chosen automatically if omitted"),
                ),
            ),
            get(
                "/api/cluster/requests",
                self._requests,
                "Requests through this node: those in progress and the last hundred",
            ),
            post("/api/cluster/forget", self._forget, "Remove a missing node from the list", ForgetBody),
            get("/health", self._health, "Whether the daemon works"),
            get(
                "/ready",
                self._ready,
                "Whether the node accepts requests; 503 while it drains",
                statuses=(503,),
            ),
            get(
                "/api/cluster/prometheus-sd",
                self._targets,
                "The nodes as targets, for Prometheus' http_sd_configs",
            ),
        ]

    async def _events(self, request: web.Request) -> web.StreamResponse:
        """``GET /api/cluster/events``: past events, then new ones as they happen."""
        log = self._services.monitor.events
        after, last = (
            integer_of(request.query, "after", -1, _MAX_ID_DIGITS),
            integer_of(request.query, "last", _DEFAULT_EVENTS),
        )
        follow = request.query.get("follow") == "" or bool(integer_of(request.query, "follow", 0))
        if "after" not in request.query:
            after = _last_event_id(request)
        if after > log.newest:
            after = -1  # the id is from before this node's clock was set back
        past = log.after(after) if after >= 0 else log.after(0, last)
        client = client_of(request).identity
        if follow:
            self._check_followers(client)
        response = web.StreamResponse(headers={"Content-Type": SSE, "Cache-Control": "no-store"})
        await response.prepare(request)
        self._followers[client] += follow
        try:
            last_id = log.newest
            await response.write(b"retry: 2000\n\n" + b"".join(map(_sse, past)))
            while follow and not self._services.monitor.closed:
                events = await self._services.monitor.next_events(last_id, _PING_SECONDS)
                if not request.app[ACCESS].may_follow(request):
                    break
                await response.write(b"".join(map(_sse, events)) or b": nothing new\n\n")
                last_id = events[-1].id if events else last_id
            await response.write_eof()
        except ConnectionError:
            pass
        finally:
            self._followers[client] -= follow
            self._followers += Counter()  # drops the callers without a stream
        return response

    def _check_followers(self, client: str) -> None:
        """Refuse another event stream if the caller or the node has too many.

        Raises:
            Refusal: UNAVAILABLE.
        """
        if self._followers[client] >= _MAX_FOLLOWERS_EACH:
            reason = f"you already have {_MAX_FOLLOWERS_EACH} event streams open; close one first"
        elif self._followers.total() >= _MAX_FOLLOWERS:
            reason = f"{_MAX_FOLLOWERS} event streams are already open"
        else:
            return
        raise Refusal(Fault.UNAVAILABLE, reason, retry_after=10)

    async def _history(self, request: web.Request) -> web.Response:
        """``GET /api/cluster/history``: series of the whole cluster and of each node."""
        span = bounded_request(
            integer_of(request.query, "seconds", 600), integer_of(request.query, "step", 0)
        )
        task = self._histories.get(span)
        if task is None:
            task = self._histories[span] = asyncio.create_task(self._gather(span), name="history")
            task.add_done_callback(retrieve_error)
            task.add_done_callback(lambda _: self._histories.pop(span, None))
        return web.Response(body=await asyncio.shield(task), headers={"Content-Type": JSON})

    async def _gather(self, span: HistoryRequest) -> bytes:
        async with self._gathering:
            return await self._encoded(span)

    async def _encoded(self, span: HistoryRequest) -> bytes:
        """Return the history of all nodes as JSON."""
        nodes = await self._services.monitor.histories(span)
        points = span.seconds // span.step
        value = {
            "time": round(time.time(), 3),
            "seconds": span.seconds,
            "step": span.step,
            "series": sorted((*TOTALS, FIRST_TOKEN)),
            "total": {name: _rounded(line) for name, line in totals(nodes, points).items()},
            "nodes": [_node_object(node) for node in sorted(nodes, key=lambda n: (natural(n.name), n.node))],
        }
        # A day's history of twenty nodes takes some ten milliseconds to encode.
        return await asyncio.to_thread(msgspec.json.encode, value)

    async def _requests(self, request: web.Request) -> web.Response:
        return json_response({"active": self._inflight.shown(), "recent": self._inflight.recent()})

    async def _forget(self, request: web.Request) -> web.Response:
        body = as_type(await read_object(request), ForgetBody)
        if not body.node:
            raise bad_request("node is required: the id or name of a node that is offline")
        await self._services.monitor.forget(body.node)
        return json_response({"forgotten": body.node})

    async def _health(self, request: web.Request) -> web.Response:
        """``GET /health``: an answer is enough to show that the daemon works."""
        return json_response({"status": "ok"})

    async def _ready(self, request: web.Request) -> web.Response:
        me = self._services.cluster.me
        if me.draining:
            response = json_response({"status": "draining"}, {"Retry-After": "10"})
            response.set_status(503)
            return response
        return json_response({"status": "ready"})

    async def _targets(self, request: web.Request) -> web.Response:
        """``GET /api/cluster/prometheus-sd``; missing nodes are listed too, so that their alert fires."""
        cluster, monitor = self._services.cluster, self._services.monitor
        missing = [node.record for node in monitor.offline() if not node.stopped]
        targets = [
            {
                "targets": [record.url.partition("://")[2]],
                "labels": {
                    "node": record.name,
                    "__meta_sollold_node_id": record.node,
                    "__meta_sollold_release": record.release,
                    **({"__scheme__": "https"} if record.tls else {}),
                },
            }
            for record in sorted((*cluster.live(), *missing), key=lambda r: (natural(r.name), r.node))
        ]
        return json_response(targets)


def _sse(event: Event) -> bytes:
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (
        event.id,
        str(event.kind).encode(),
        msgspec.json.encode(as_object(event)),
    )


def _last_event_id(request: web.Request) -> int:
    """Return the last event that a reconnecting EventSource has received; -1 for none."""
    text = request.headers.get("Last-Event-ID", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _MAX_ID_DIGITS else -1


def _node_object(history: NodeHistory) -> dict[str, Any]:
    return {
        "node": history.node,
        "name": history.name,
        "series": {name: _rounded(line) for name, line in sorted(history.series.items())},
        "devices": [
            {"id": device, **{name: _rounded(line) for name, line in sorted(series.items())}}
            for device, series in sorted(history.devices.items())
        ],
    }


def _rounded(line: list[float]) -> list[float | None]:
    """Round a series; None for missing values."""
    return [None if value != value else round(value, _DIGITS) for value in line]
