"""The RPC workers that this node runs for deployments, and their tensor caches."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from sollold.agent.cache_fills import CacheFills
from sollold.engines.commands import Commit
from sollold.engines.install.find import Llama
from sollold.engines.llamacpp.child_journal import Journal
from sollold.engines.llamacpp.ports import Ports
from sollold.engines.llamacpp.rpc_worker import Worker
from sollold.engines.llamacpp.tensor_cache import TensorCache
from sollold.facts import dataclass
from sollold.machine.speed import cores
from sollold.settings.paths import Places
from sollold.settings.schema import LlamaSettings
from sollold.tasks import cancel_and_wait

log = logging.getLogger("sollold.agent")


@dataclass(frozen=True, slots=True)
class _Running:
    """A worker and what it was started for. ``size``: bytes granted to it."""

    worker: Worker
    request: Commit
    llama: Llama
    size: int


class OwnWorkers:
    """At most one worker per deployment.

    Args:
        node: this node's id.
        exited: called when a worker has exited by itself.
        changed: called when `cached` has changed.

    Attributes:
        cached: (digest prefix of a model, bytes cached of its tensors), for the record.
    """

    def __init__(
        self,
        node: str,
        settings: LlamaSettings,
        places: Places,
        journal: Journal,
        ports: Ports,
        cache: TensorCache,
        fills: CacheFills,
        *,
        exited: Callable[[str, Worker], None],
        changed: Callable[[], None],
    ) -> None:
        self._node = node
        self._settings = settings
        self._logs = places.state / "logs"
        self._journal = journal
        self._ports = ports
        self._exited = exited
        self._changed = changed
        self._cache = cache
        self._fills = fills
        self._running: dict[str, _Running] = {}
        self._making: dict[str, asyncio.Task[Path | None]] = {}
        """Tasks that make the cache folders; a thread in one may outlast the start that needed it."""
        self._keeping: dict[str, asyncio.Task[None]] = {}
        """Tasks that take over the tensors of loaded deployments."""
        self.cached: tuple[tuple[str, int], ...] = ()

    async def clean_up(self) -> None:
        """Delete what an earlier run's workers left unfinished, and list what they cached."""
        await asyncio.to_thread(self._cache.remove_leftovers)
        if self._settings.worker_cache:
            self.cached = await asyncio.to_thread(self._cache.models)

    def get(self, deployment: str) -> Worker | None:
        """Return the worker of a deployment, or None."""
        running = self._running.get(deployment)
        return running.worker if running is not None else None

    def digest(self, deployment: str) -> str:
        """Return the digest of the model of a deployment's worker; empty without a worker."""
        running = self._running.get(deployment)
        return running.request.digest if running is not None else ""

    async def start(self, request: Commit, llama: Llama, size: int) -> None:
        """Start the worker requested by ``request``, to which ``size`` bytes were granted.

        Raises:
            WorkerFailed: it did not start.
        """
        deployment = request.deployment
        cache: Path | None = None
        if self._settings.worker_cache and request.head != self._node:
            cache = await self._make_folder(deployment, size)
        worker = await Worker.start(
            llama,
            request.devices,
            deployment=deployment,
            ports=self._ports,
            journal=self._journal,
            logs=self._logs / deployment,
            threads=self._settings.threads or cores(),
            cache=cache,
        )
        self._running[deployment] = _Running(worker, request, llama, size)
        worker.process.exited.add_done_callback(lambda exited: self._ended(deployment, worker))

    async def _make_folder(self, deployment: str, size: int) -> Path | None:
        making = self._making[deployment] = asyncio.create_task(
            asyncio.to_thread(self._cache.make_folder, deployment, size)
        )
        making.add_done_callback(lambda _: self._making.pop(deployment, None))
        return await asyncio.shield(making)

    async def stop(self, deployment: str) -> None:
        """Stop the worker of a deployment, if there is one."""
        running = self._running.pop(deployment, None)
        if running is not None:
            await running.worker.stop()

    async def delete_files(self, deployment: str) -> None:
        """Delete the unfinished files of a stopped worker. The disk may be slow or not respond at all."""
        await self._fills.end_deployment(deployment)
        if (making := self._making.get(deployment)) is not None:
            await asyncio.wait({making})
        await asyncio.to_thread(self._cache.remove_folder, deployment)

    async def start_again(self, deployment: str) -> None:
        """Replace the worker of a deployment by a new one, possibly on another port.

        A worker has no state between two connections, so nothing is lost.

        Raises:
            WorkerFailed: the new one did not start.
        """
        replaced = self._running[deployment]
        stopping = asyncio.ensure_future(self.stop(deployment))
        try:
            await asyncio.shield(stopping)
        except asyncio.CancelledError:
            await stopping  # the end of the deployment relies on its memory being free
            raise
        await self.delete_files(deployment)
        await self.start(replaced.request, replaced.llama, replaced.size)

    def keep_tensors(self, deployment: str) -> None:
        """Start to take over the tensors of a loaded deployment, unless that is in progress.

        In a task: a head whose renewals are not answered in time ends the deployment, and the disk may be
        slow or not respond at all.
        """
        if deployment in self._keeping:
            return
        task = self._keeping[deployment] = asyncio.create_task(
            self._keep(deployment), name=f"tensors of {deployment}"
        )
        task.add_done_callback(lambda _: self._keeping.pop(deployment, None))

    async def _keep(self, deployment: str) -> None:
        try:
            if await self.loaded(deployment):
                self._changed()
        except Exception:
            log.exception("the tensors of %s are not cached", deployment, extra={"deployment": deployment})

    async def loaded(self, deployment: str) -> bool:
        """Keep the tensors of a deployment, all of which have arrived. Returns whether `cached` changed."""
        running = self._running.get(deployment)
        if running is None:
            return False
        await self._fills.end_deployment(deployment)
        await asyncio.to_thread(self._cache.keep, deployment, running.request.digest)
        previous, self.cached = self.cached, await asyncio.to_thread(self._cache.models)
        return previous != self.cached

    async def close(self) -> None:
        """Give up taking over tensors. The workers are stopped one by one, see `stop`."""
        await cancel_and_wait(*self._keeping.values())

    def _ended(self, deployment: str, worker: Worker) -> None:
        if self.get(deployment) is worker:
            self._exited(deployment, worker)
