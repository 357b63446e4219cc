"""``/metrics`` for Prometheus."""

from __future__ import annotations

import asyncio
import gzip
import importlib

from aiohttp import web

from sollold.api.http.request_log import KeyUsage, ResponseCounts
from sollold.api.http.route import Route
from sollold.api.http.services import AppServices

_MIN_GZIP_BYTES = 4096


class Metrics:
    """Answers ``/metrics``."""

    def __init__(self, services: AppServices, answers: ResponseCounts, usage: dict[str, KeyUsage]) -> None:
        self._services = services
        self._usage = usage
        self._answers = answers
        self._collecting = asyncio.Lock()
        self._text, self._text_from = b"", -1
        self._requests = self._waiting = 0

    def routes(self) -> list[Route]:
        """Return the route table."""
        return [
            Route(
                "GET",
                "/metrics",
                self._show,
                "Metrics for Prometheus",
                produces=("text/plain",),
            )
        ]

    async def _show(self, request: web.Request) -> web.Response:
        self._requests += 1
        number = self._requests
        self._waiting += 1
        try:
            async with self._collecting:
                # A request that waited shares the result of a collection that began after it.
                if self._text_from < number:
                    latest = self._requests
                    self._text = await self._collect()
                    self._text_from = latest
                text = self._text
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._text = b""
        headers = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        if "gzip" in request.headers.get("Accept-Encoding", "") and len(text) > _MIN_GZIP_BYTES:
            # Prometheus requests it: a twentieth of the size.
            text = await asyncio.to_thread(gzip.compress, text, 1)
            headers["Content-Encoding"] = "gzip"
        return web.Response(body=text, headers=headers)

    async def _collect(self) -> bytes:
        # Imported at the first request: rarely needed, and an idle daemon should be small.
        await asyncio.to_thread(importlib.import_module, "sollold.api.cluster.metric_families")
        from sollold.api.cluster import metric_families as families

        services, engines = self._services, self._services.engine_metrics
        current = families.node_metrics(services.cluster, services.monitor, services.dropped)
        text = await asyncio.to_thread(
            families.render_metrics, current, self._answers, services.monitor, self._usage
        )
        if engines is None:
            return text
        texts = await engines.texts()
        return text + await asyncio.to_thread(families.render_engine_metrics, texts)
