"""This node gets a model's file from another node, since the leader wants it to run the model."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sollold.agent.commands import Fetch, Fetched
from sollold.cluster.peer import PeerServer
from sollold.cluster.term import Term
from sollold.config import GIB
from sollold.models.model import Model
from sollold.models.pull import PullError

log = logging.getLogger("sollold.agent")

UNASKED_SECONDS = 30.0
"""A fetch that the leader has not asked about for so long is wanted no more; what has come is kept."""
AT_A_TIME = 2
LEFT = 5 * GIB
"""Bytes of the disk that are left alone: nobody has asked this machine's owner."""


class Puller(Protocol):
    """`sollold.models.pull.Puller`, as far as it is needed."""

    def pull(self, name: str, *, nodes_only: bool = False) -> AsyncGenerator[dict[str, Any], None]:
        """Fetch a model, telling how far it is."""
        ...

    def holders(self, name: str) -> tuple[tuple[str, Model], ...]:
        """Nodes whose files of the model can be read."""
        ...


@dataclass(slots=True)
class _Flight:
    size: int
    task: asyncio.Task[None] | None = None
    asked: float = 0.0
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    failed: str = ""

    @property
    def under_way(self) -> bool:
        return self.task is None or not self.task.done()

    @property
    def missing(self) -> int:
        """Bytes that have yet to come."""
        return max(0, self.size - sum(completed for completed, _ in self.sizes.values()))


class Fetcher:
    """Answers the peer call ``fetch``. `register` before the peer server starts; at the end `close`.

    Args:
        has: whether a model of this digest is on this node.
        obey: why a command of this term is not obeyed; empty when it is.
        folder: where models go.
        allowed: whether this node's settings let the leader do so.
    """

    def __init__(
        self,
        puller: Puller,
        has: Callable[[str], bool],
        obey: Callable[[Term], Awaitable[str]],
        folder: Path,
        allowed: bool,
    ) -> None:
        self._puller = puller
        self._has = has
        self._obey = obey
        self._folder = folder
        self._allowed = allowed
        self._flights: dict[str, _Flight] = {}

    def register(self, server: PeerServer) -> None:
        """Answer the peer call."""
        server.method("fetch", Fetch, self._fetch)

    async def close(self) -> None:
        """End every fetch; what has come is kept."""
        tasks = [flight.task for flight in self._flights.values() if flight.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _fetch(self, caller: str, request: Fetch) -> Fetched:
        if refusal := await self._obey(request.term):
            return Fetched(failed=refusal)
        if self._has(request.digest):
            self._flights.pop(request.digest, None)
            return Fetched(done=True)
        now = asyncio.get_running_loop().time()
        flight = self._flights.get(request.digest)
        if flight is None:
            for digest, one in list(self._flights.items()):
                if one.task is not None and one.task.done() and now - one.asked > UNASKED_SECONDS:
                    del self._flights[digest]
            size = next(
                (m.size for _, m in self._puller.holders(request.model) if m.digest == request.digest), 0
            )
            if refusal := await self._why_not(request, size):
                return Fetched(failed=refusal)
            flight = self._flights.setdefault(request.digest, _Flight(size))
        flight.asked = now
        if flight.task is None:
            log.info("%s is fetched, to be run here", request.model)
            flight.task = asyncio.create_task(self._fly(flight, request), name=f"fetch {request.model}")
        if flight.task.done():
            # The next order begins anew.
            self._flights.pop(request.digest, None)
            return Fetched(failed=flight.failed or "the file that came is not the one that was asked for")
        done = sum(completed for completed, _ in flight.sizes.values())
        return Fetched(completed=done, total=sum(total for _, total in flight.sizes.values()))

    async def _why_not(self, request: Fetch, size: int) -> str:
        if not self._allowed:
            return "models.fetch_seconds is 0 on this node: it fetches nothing unasked"
        if not size:
            return f"this node does not know yet who has {request.model}"
        free = await asyncio.to_thread(_free, self._folder)
        others = [one for id, one in self._flights.items() if one.under_way and id != request.digest]
        if len(others) >= AT_A_TIME:
            return "other models are being fetched here"
        # The disk does not know yet of what the others will write.
        if free - size - sum(one.missing for one in others) < LEFT:
            return f"its disk has no room to spare for {request.model}"
        return ""

    async def _fly(self, flight: _Flight, request: Fetch) -> None:
        loop = asyncio.get_running_loop()
        steps = self._puller.pull(request.model, nodes_only=True)
        try:
            async with contextlib.aclosing(steps):
                async for step in steps:
                    if total := int(step.get("total", 0)):
                        flight.sizes[str(step.get("digest", ""))] = (int(step.get("completed", 0)), total)
                    if loop.time() - flight.asked > UNASKED_SECONDS:
                        flight.failed = "nobody waits for it any more"
                        log.info("%s is not fetched any more: %s", request.model, flight.failed)
                        return
        except PullError as error:
            flight.failed = str(error)
            log.warning("%s could not be fetched: %s", request.model, error)
        except Exception as error:
            flight.failed = f"by a fault of our own: {error or type(error).__name__}"
            log.exception("%s could not be fetched", request.model)


def _free(folder: Path) -> int:
    """Bytes that the disk of a folder has, which need not be there yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free
