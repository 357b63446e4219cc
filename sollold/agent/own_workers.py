"""The workers that this node runs for deployments, and what they keep of tensors."""

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

log = logging.getLogger("sollold.agent")


@dataclass(frozen=True, slots=True)
class _Running:
    """A worker and what it was started for. ``size``: bytes that were granted to it."""

    worker: Worker
    request: Commit
    llama: Llama
    size: int


class OwnWorkers:
    """One worker at most for each deployment.

    Args:
        node: this node's id.
        exited: told when a worker ended that nobody has stopped.

    Attributes:
        cached: for the record: (beginning of a model's digest, bytes of its tensors that are kept here).
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
        exited: Callable[[str, Worker], None],
    ) -> None:
        self._node = node
        self._settings = settings
        self._logs = places.state / "logs"
        self._journal = journal
        self._ports = ports
        self._exited = exited
        self._cache = cache
        self._fills = fills
        self._running: dict[str, _Running] = {}
        self.cached: tuple[tuple[str, int], ...] = ()

    async def clean_up(self) -> None:
        """Remove what workers of an earlier run left, and see what they kept."""
        await asyncio.to_thread(self._cache.remove_leftovers)
        if self._settings.worker_cache:
            self.cached = await asyncio.to_thread(self._cache.models)

    def get(self, deployment: str) -> Worker | None:
        """The worker of a deployment."""
        running = self._running.get(deployment)
        return running.worker if running is not None else None

    def digest(self, deployment: str) -> str:
        """Of the model that a deployment's worker was started for; empty when there is none."""
        running = self._running.get(deployment)
        return running.request.digest if running is not None else ""

    async def start(self, request: Commit, llama: Llama, size: int) -> None:
        """Start the worker that ``request`` wants; ``size`` bytes were granted to it.

        Raises:
            WorkerFailed: it did not start.
        """
        deployment = request.deployment
        cache: Path | None = None
        if self._settings.worker_cache and request.head != self._node:
            cache = await asyncio.to_thread(self._cache.make_folder, deployment, size)
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

    async def stop(self, deployment: str) -> None:
        """End the worker of a deployment, if there is one, and remove what it has not finished."""
        running = self._running.pop(deployment, None)
        if running is not None:
            await running.worker.stop()
        await self._fills.end_deployment(deployment)
        await asyncio.to_thread(self._cache.remove_folder, deployment)

    async def start_again(self, deployment: str) -> None:
        """End the worker of a deployment and start one like it, on another port perhaps.

        It keeps nothing between two connections, so that between them nobody misses it.

        Raises:
            WorkerFailed: the new one did not start.
        """
        before = self._running[deployment]
        stopping = asyncio.ensure_future(self.stop(deployment))
        try:
            await asyncio.shield(stopping)
        except asyncio.CancelledError:
            await stopping  # who ends the deployment counts on its memory
            raise
        await self.start(before.request, before.llama, before.size)

    async def loaded(self, deployment: str) -> bool:
        """All tensors of a deployment have arrived: keep them. Returns whether `cached` changed."""
        running = self._running.get(deployment)
        if running is None:
            return False
        await self._fills.end_deployment(deployment)
        await asyncio.to_thread(self._cache.keep, deployment, running.request.digest)
        before, self.cached = self.cached, await asyncio.to_thread(self._cache.models)
        return before != self.cached

    def _ended(self, deployment: str, worker: Worker) -> None:
        if self.get(deployment) is worker:
            self._exited(deployment, worker)
