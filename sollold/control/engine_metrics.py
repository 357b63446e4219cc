"""Reads ``/metrics`` of this node's llama-servers, each with the model that it runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import aiohttp

from sollold.cluster.gossip.record import Backend, Record
from sollold.engines.address import EngineAddress
from sollold.facts import dataclass
from sollold.models.transfer.bounded_answer import read_whole

log = logging.getLogger("sollold.control")

_TIMEOUT_SECONDS = 1.0
"""Timeout for all engines, which are asked concurrently: the scraper waits, and an engine that computes a
long batch responds late."""
_MAX_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class EngineText:
    """The metrics of one engine, in Prometheus' text format."""

    deployment: str
    model: str
    text: str


class EngineMetrics:
    """Reads the metrics of this node's engines.

    Args:
        me: returns this node's record.
        address: returns the address of an endpoint's engine; None when it is not running.
    """

    def __init__(self, me: Callable[[], Record], address: Callable[[str], EngineAddress | None]) -> None:
        self._me = me
        self._address = address
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def texts(self) -> list[EngineText]:
        """Return the metrics of all engines, leaving out those that do not respond in time."""
        endpoints = [e for e in self._me().endpoints if e.backend is not Backend.OLLAMA]
        targets = [(e, engine) for e in endpoints if (engine := self._address(e.id)) is not None]
        texts = await asyncio.gather(*(self._text(engine) for _, engine in targets))
        return [
            EngineText(endpoint.id, endpoint.model, text)
            for (endpoint, _), text in zip(targets, texts, strict=True)
            if text is not None
        ]

    async def _text(self, engine: EngineAddress) -> str | None:
        if self._session is None:
            self._session = aiohttp.ClientSession()
        try:
            async with (
                asyncio.timeout(_TIMEOUT_SECONDS),
                self._session.get(f"{engine.url}/metrics", headers=engine.headers) as answer,
            ):
                # A truncated text would be invalid in that format.
                raw = await read_whole(answer, _MAX_BYTES) if answer.status == 200 else None
                return raw.decode("utf-8", "replace") if raw is not None else None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            log.debug("no metrics from the engine at %s: %s", engine.url, error)
            return None
