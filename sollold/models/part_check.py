"""Whether the bytes of a part are those of the file that is fetched: the node that has it tells their hash.

A file's digest (`sollold.models.identity`) is over samples alone, so parts of two files that differ between
the samples, or one that a failing disk gave, would pass. One node at a time is the measure of all parts,
whichever node they come from: so no mixture of two files is ever put together.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor
from dataclasses import dataclass

from sollold.cluster.peer import PeerCalls, PeerError
from sollold.models.fill import CheckLost
from sollold.models.landing import Landing
from sollold.models.threads import in_thread

_TIMEOUT = 30.0
_ATTEMPTS = 5
"""Times that the node is asked: over some eight seconds, so that it may be started anew."""
_PAUSE = 0.5
LARGEST = 64 << 20
"""Bytes whose hash is told at a time, at the most."""


@dataclass(frozen=True, slots=True)
class WhatPart:
    """Peer method ``part``: asks for the hash of the bytes from ``start`` to before ``end`` of one file."""

    digest: str
    index: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class PartHash:
    """The answer: hex sha256."""

    sha256: str


class PartCheck:
    """One node as the measure of a model's parts."""

    def __init__(
        self,
        calls: PeerCalls,
        node: str,
        digest: str,
        landing: Landing,
        threads: Executor,
        pause: float = _PAUSE,
    ) -> None:
        """``pause``: seconds before the node is asked again when it could not be; doubled each time."""
        self.node = node
        self._calls = calls
        self._digest = digest
        self._landing = landing
        self._threads = threads
        self._pause = pause

    async def right(self, index: int, part: int) -> bool:
        """Whether the node has just the bytes that have come. True for a file that is checked as a whole.

        Raises:
            CheckLost: the node can't be asked.
            OSError: the bytes can't be read again here.
        """
        if self._landing.items[index].sha256:
            return True
        start, end = self._landing.span(index, part)
        told = asyncio.ensure_future(self._told(WhatPart(self._digest, index, start, end)))
        try:
            have = await in_thread(self._threads, self._landing.sha256_of, index, part)
            return have == await told
        finally:
            told.cancel()
            await asyncio.gather(told, return_exceptions=True)

    async def adopt(self) -> None:
        """Check what an earlier attempt took by another node's word; what differs is fetched again.

        Raises:
            CheckLost, OSError: as `right`.
        """
        if self._landing.measure != self.node:
            for index, part in self._landing.unproved():
                if not await self.right(index, part):
                    await in_thread(self._threads, self._landing.forget, index, part)
            self._landing.measure = self.node

    async def _told(self, request: WhatPart) -> str:
        for attempt in range(_ATTEMPTS):
            try:
                told = await self._calls.call(self.node, "part", request, PartHash, timeout=_TIMEOUT)
            except PeerError as error:
                fault = error
                if attempt + 1 < _ATTEMPTS:
                    await asyncio.sleep(min(5.0, self._pause * 2**attempt))
            else:
                return told.sha256
        raise CheckLost(f"node {self.node} does not tell what it has: {fault}") from None
