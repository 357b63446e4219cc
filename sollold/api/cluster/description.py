"""``/openapi.json``, built at the first request: it takes half a second and some MB of schemas."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec
from aiohttp import web

from sollold.api.http.response import JSON
from sollold.api.http.route import Route


class DescriptionRoute:
    """Serves the description. ``rows``: the route table, which may grow until the first request."""

    def __init__(self, rows: Sequence[Route]) -> None:
        self._rows = rows
        self._text = b""
        self._lock = asyncio.Lock()

    def route(self) -> Route:
        """Return the route."""
        return Route("GET", "/openapi.json", self._show, "This description")

    async def _show(self, request: web.Request) -> web.Response:
        async with self._lock:
            self._text = self._text or await asyncio.to_thread(_encode, self._rows)
        return web.Response(body=self._text, headers={"Content-Type": JSON})


def _encode(rows: Sequence[Route]) -> bytes:
    from sollold.api.cluster.openapi import (
        describe,  # rarely needed, and an idle daemon should be small
    )

    return msgspec.json.encode(describe(rows))
