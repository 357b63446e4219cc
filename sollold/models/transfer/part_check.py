"""Whether the bytes of a part are those of the file that is fetched: the node that has it tells their digest.

A file's digest (`sollold.models.stores.content_digest`) is over samples alone, so parts of two files that
differ between the samples, or one that a failing disk gave, would pass. One node at a time is the measure of
all parts, whichever node they come from: so no mixture of two files is ever put together.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor

from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_client import Calls
from sollold.facts import dataclass
from sollold.models.stores.threads import in_thread
from sollold.models.transfer.download import CheckLost
from sollold.models.transfer.file_digest import new_key
from sollold.models.transfer.partial_file import PartialFile

_TIMEOUT = 30.0
_ATTEMPTS = 5
"""Times that the node is asked: over some eight seconds, so that it may be started anew."""
_PAUSE = 0.5
"""Seconds before the node is asked again when it could not be; doubled each time."""
LARGEST = 64 << 20
"""Bytes whose digest is told at a time, at the most."""


@dataclass(frozen=True, slots=True)
class PartDigestRequest:
    """Peer method ``part``: asks for the digest of the bytes from ``start`` to before ``end`` of one file.

    ``key``: of their GMAC; a node of an older release sends none.
    """

    digest: str
    index: int
    start: int
    end: int
    key: str = ""


@dataclass(frozen=True, slots=True)
class PartHash:
    """The answer, in hex: the GMAC where a key came; else, and from a node of an older release, sha256."""

    sha256: str = ""
    gmac: str = ""


async def same_bytes(
    ask: Callable[[str], Awaitable[PartHash]], digest: Callable[[str], Awaitable[str]]
) -> bool:
    """Whether two nodes have the same bytes. Both read them at the same time.

    Args:
        ask: (key) → what the other node answers.
        digest: (key) → this node's own: the GMAC, or sha256 where the key is empty.

    Raises:
        Whatever these two raise.
    """
    key = new_key()
    asked = asyncio.ensure_future(ask(key))
    try:
        have = await digest(key)
        told = await asked
        return have == told.gmac if told.gmac else await digest("") == told.sha256
    finally:
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)


class PartCheck:
    """Checks the parts of a model by the word of one node."""

    def __init__(
        self, calls: Calls, node: str, name: str, digest: str, partial: PartialFile, threads: Executor
    ) -> None:
        """``name``: the node's, for people."""
        self.node = node
        self._name = name
        self._calls = calls
        self._digest = digest
        self._partial = partial
        self._threads = threads

    async def right(self, index: int, part: int) -> bool:
        """Whether the node has just the bytes that have come. True for a file that is checked as a whole.

        Raises:
            CheckLost: the node can't be asked.
            OSError: the bytes can't be read again here.
        """
        if self._partial.items[index].sha256:
            return True
        start, end = self._partial.span(index, part)
        return await same_bytes(
            lambda key: self._told(PartDigestRequest(self._digest, index, start, end, key)),
            lambda key: in_thread(self._threads, self._partial.digest_of, index, part, key),
        )

    async def adopt(self) -> None:
        """Check what an earlier attempt took by another node's word; what differs is fetched again.

        Raises:
            CheckLost, OSError: as `right`.
        """
        if self._partial.measure != self.node:
            for index, part in self._partial.unproved():
                if not await self.right(index, part):
                    await in_thread(self._threads, self._partial.forget, index, part)
            self._partial.measure = self.node

    async def _told(self, request: PartDigestRequest) -> PartHash:
        for attempt in range(_ATTEMPTS):
            try:
                told = await self._calls.call(self.node, "part", request, PartHash, timeout=_TIMEOUT)
            except PeerError as error:
                fault = error
                if attempt + 1 < _ATTEMPTS:
                    await asyncio.sleep(min(5.0, _PAUSE * 2**attempt))
            else:
                return told
        raise CheckLost(f"what came can't be checked by {self._name}: {fault}") from None
