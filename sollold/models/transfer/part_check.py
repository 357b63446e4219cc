"""Verifies the received bytes of a part against their digest on a node that has the file.

A model's digest (`sollold.models.stores.content_digest`) covers samples only, so it would not detect parts
that differ between the samples, or that a failing disk returned. One node at a time is the reference for all
parts, whichever node they come from, so two different files are never mixed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor

from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_client import RpcClient
from sollold.facts import dataclass
from sollold.models.stores.threads import in_thread
from sollold.models.transfer.download import CheckLost
from sollold.models.transfer.file_digest import new_key
from sollold.models.transfer.partial_file import PartialFile
from sollold.tasks import cancel_and_wait

_TIMEOUT = 30.0
_ATTEMPTS = 5
"""Number of attempts: over some eight seconds, so that the node may restart."""
_PAUSE = 0.5
"""Seconds before the second attempt; doubled for each further one."""
LARGEST = 64 << 20
"""Maximum number of bytes for one digest."""


@dataclass(frozen=True, slots=True)
class PartDigestRequest:
    """Peer method ``part``: requests the digest of the bytes from ``start`` up to, not including, ``end``.

    ``key``: key of the GMAC; a node of an older release sends none.
    """

    digest: str
    index: int
    start: int
    end: int
    key: str = ""


@dataclass(frozen=True, slots=True)
class PartHash:
    """The response, in hex: the GMAC if a key was sent; otherwise, and from older releases, the sha256."""

    sha256: str = ""
    gmac: str = ""


async def same_bytes(
    ask: Callable[[str], Awaitable[PartHash]], digest: Callable[[str], Awaitable[str]]
) -> bool:
    """Return whether two nodes have the same bytes. Both read them at the same time.

    Args:
        ask: (key) → the other node's response.
        digest: (key) → this node's own: the GMAC, or sha256 if the key is empty.

    Raises:
        Any exception of ``ask`` or ``digest``.
    """
    key = new_key()
    asking = asyncio.ensure_future(ask(key))
    try:
        own_digest = await digest(key)
        response = await asking
        return own_digest == response.gmac if response.gmac else await digest("") == response.sha256
    finally:
        await cancel_and_wait(asking)


class PartCheck:
    """Verifies the parts of a model with one node as the reference."""

    def __init__(
        self, calls: RpcClient, node: str, name: str, digest: str, partial: PartialFile, threads: Executor
    ) -> None:
        """``name``: the node's display name."""
        self.node = node
        self._name = name
        self._calls = calls
        self._digest = digest
        self._partial = partial
        self._threads = threads

    async def right(self, index: int, part: int) -> bool:
        """Return whether the node has the same bytes; always True for files that are verified as a whole.

        Raises:
            CheckLost: the node can't be reached.
            OSError: the bytes can't be read back here.
        """
        if self._partial.items[index].sha256:
            return True
        start, end = self._partial.span(index, part)
        return await same_bytes(
            lambda key: self._remote_digest(PartDigestRequest(self._digest, index, start, end, key)),
            lambda key: in_thread(self._threads, self._partial.digest_of, index, part, key),
        )

    async def adopt(self) -> None:
        """Verify the parts that another node verified in an earlier attempt; forget those that differ.

        Raises:
            CheckLost, OSError: as `right`.
        """
        if self._partial.measure != self.node:
            for index, part in self._partial.unproved():
                if not await self.right(index, part):
                    await in_thread(self._threads, self._partial.forget, index, part)
            self._partial.measure = self.node

    async def _remote_digest(self, request: PartDigestRequest) -> PartHash:
        for attempt in range(_ATTEMPTS):
            try:
                response = await self._calls.call(self.node, "part", request, PartHash, timeout=_TIMEOUT)
            except PeerError as error:
                fault = error
                if attempt + 1 < _ATTEMPTS:
                    await asyncio.sleep(min(5.0, _PAUSE * 2**attempt))
            else:
                return response
        raise CheckLost(f"the received data can't be verified by {self._name}: {fault}") from None
