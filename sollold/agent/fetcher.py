"""Downloads a model from another node when the leader wants to run it here."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import field
from functools import partial
from pathlib import Path

from sollold.cluster.gossip.term import Term
from sollold.cluster.net.rpc_server import RpcServer
from sollold.engines.commands import Fetch, Fetched
from sollold.facts import dataclass
from sollold.models.stores.patient_read import read_patiently
from sollold.models.transfer.pull import Puller
from sollold.models.transfer.pull_progress import PullError
from sollold.settings.schema import GIB
from sollold.tasks import cancel_and_wait

log = logging.getLogger("sollold.agent")

UNASKED_SECONDS = 30.0
"""Seconds without a request from the leader after which a download is cancelled, keeping its data."""
AT_A_TIME = 2
_DISK_SECONDS = 3.0
"""Timeout for asking the disk for its free space, in seconds."""
LEFT = 5 * GIB
"""Disk space that downloads leave free, in bytes: this machine's owner did not order them."""


@dataclass(slots=True)
class _Fetch:
    size: int
    task: asyncio.Task[None] | None = None
    asked: float = 0.0
    unasked: asyncio.Timeout | None = None
    """Expires when the leader no longer asks for it."""
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    failed: str = ""

    @property
    def under_way(self) -> bool:
        return self.task is None or not self.task.done()

    @property
    def missing(self) -> int:
        """Number of bytes not yet downloaded."""
        return max(0, self.size - sum(completed for completed, _ in self.sizes.values()))


class Fetcher:
    """Serves the peer call ``fetch``. Call `register` before the peer server starts and `close` at the end.

    Args:
        has: returns whether a model of this digest is on this node.
        obey: returns why a command of a node in a term is refused, or an empty string.
        folder: where models are stored.
        allowed: whether this node's settings permit downloads by the leader.
    """

    def __init__(
        self,
        puller: Puller,
        has: Callable[[str], bool],
        obey: Callable[[str, Term], Awaitable[str]],
        folder: Path,
        allowed: bool,
    ) -> None:
        self._puller = puller
        self._has = has
        self._obey = obey
        self._folder = folder
        self._allowed = allowed
        self._fetches: dict[str, _Fetch] = {}

    def register(self, server: RpcServer) -> None:
        """Register the peer method."""
        server.method("fetch", Fetch, self._fetch)

    async def close(self) -> None:
        """Cancel every download, keeping received data."""
        await cancel_and_wait(*(fetch.task for fetch in self._fetches.values()))

    async def _fetch(self, caller: str, request: Fetch) -> Fetched:
        if refusal := await self._obey(caller, request.term):
            return Fetched(failed=refusal)
        if request.stop:
            return await self._stop(request)
        if self._has(request.digest):
            self._fetches.pop(request.digest, None)
            return Fetched(done=True)
        now = asyncio.get_running_loop().time()
        fetch = self._fetches.get(request.digest)
        if fetch is None:
            for digest, entry in list(self._fetches.items()):
                if entry.task is not None and entry.task.done() and now - entry.asked > UNASKED_SECONDS:
                    del self._fetches[digest]
            size = next(
                (m.size for _, m in self._puller.holders(request.model) if m.digest == request.digest), 0
            )
            try:
                free = await read_patiently(partial(_free, self._folder), self._folder, _DISK_SECONDS)
            except LookupError as error:
                return Fetched(failed=str(error))
            # From here to its registration nothing is awaited: other requests must count it.
            fetch = self._fetches.get(request.digest)
            if fetch is None:
                if refusal := self._refusal(request, size, free):
                    return Fetched(failed=refusal)
                fetch = self._fetches[request.digest] = _Fetch(size)
        fetch.asked = now
        if fetch.unasked is not None and fetch.under_way:
            with contextlib.suppress(RuntimeError):  # it has just expired
                fetch.unasked.reschedule(now + UNASKED_SECONDS)
        if fetch.task is None:
            log.info("fetching %s to run it here", request.model)
            fetch.task = asyncio.create_task(self._run(fetch, request), name=f"fetch {request.model}")
        if fetch.task.done():
            # The next request starts again.
            self._fetches.pop(request.digest, None)
            return Fetched(failed=fetch.failed or "the downloaded file is not the requested one")
        done = sum(completed for completed, _ in fetch.sizes.values())
        return Fetched(completed=done, total=sum(total for _, total in fetch.sizes.values()))

    async def _stop(self, request: Fetch) -> Fetched:
        fetch = self._fetches.pop(request.digest, None)
        if fetch is not None and fetch.task is not None and not fetch.task.done():
            log.info("download of %s cancelled: its load was cancelled", request.model)
            fetch.failed = "its load was cancelled"
            await cancel_and_wait(fetch.task)
        return Fetched(failed="its load was cancelled")

    def _refusal(self, request: Fetch, size: int, free: int) -> str:
        if not self._allowed:
            return "models.fetch_seconds is 0 on this node: the leader may not start downloads here"
        if not size:
            return f"this node does not know yet which node has {request.model}"
        others = [fetch for id, fetch in self._fetches.items() if fetch.under_way and id != request.digest]
        if len(others) >= AT_A_TIME:
            return "other models are being downloaded here"
        # The free space still includes what the other downloads will write.
        if free - size - sum(fetch.missing for fetch in others) < LEFT:
            return f"its disk has no space for {request.model}"
        return ""

    async def _run(self, fetch: _Fetch, request: Fetch) -> None:
        steps = self._puller.pull(request.model, nodes_only=True)
        try:
            patience = asyncio.timeout_at(fetch.asked + UNASKED_SECONDS)
            async with patience as fetch.unasked, contextlib.aclosing(steps):
                async for step in steps:
                    if total := int(step.get("total", 0)):
                        fetch.sizes[str(step.get("digest", ""))] = (int(step.get("completed", 0)), total)
        except TimeoutError:
            fetch.failed = "no request needs it any more"
            log.info("download of %s cancelled: %s", request.model, fetch.failed)
        except PullError as error:
            fetch.failed = str(error)
            log.warning("download of %s failed: %s", request.model, error)
        except Exception as error:
            fetch.failed = f"internal error: {error or type(error).__name__}"
            log.exception("download of %s failed", request.model)


def _free(folder: Path) -> int:
    """Return the free bytes of the disk of a folder, which need not exist yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free
