"""Manages a deployment's participants, the nodes that hold memory for it, from its head: commit, connect,
renew, release.

A broken tunnel, a lost grant or an unreachable node ends the deployment.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

from sollold.cluster.gossip.term import Term
from sollold.cluster.net.rpc import PeerError
from sollold.engines.commands import GRANT_SECONDS, Commit, Done, FillCache, Release, Renew
from sollold.engines.llamacpp.command_line import (
    WorkerAddress,
    external_workers,
    worker_devices,
    worker_nodes,
)
from sollold.engines.llamacpp.context import DeploymentContext
from sollold.engines.llamacpp.tunnel import Tunnel
from sollold.engines.llamacpp.wanted_tensors import wanted_tensors
from sollold.facts import dataclass
from sollold.machine.external_worker import split_address
from sollold.models.gguf.header import GgufError, Header
from sollold.models.model import Model
from sollold.placement.plan import Plan

log = logging.getLogger("sollold.engines")

RENEW_SECONDS = 3.0
COMMIT_SECONDS = 60.0
BREAK_SECONDS = 0.2
"""Delay before a broken tunnel is reported, in which the node may report a more precise reason."""
_RENEW_TIMEOUT = 2.5
_RELEASE_TIMEOUT = 15.0
_CLOSE_TIMEOUT = 2.0
_FILL_TIMEOUT = 2.0


class ParticipantFailed(Exception):
    """A node did not do its part; the message says why."""

    def __init__(self, node: str, reason: str) -> None:
        super().__init__(reason)
        self.node = node


class OnLost(Protocol):
    """Called when a participant's part is lost."""

    def __call__(self, reason: str, *, culprit: str) -> None:
        """``reason``: for users; ``culprit``: the node. May be called more than once."""
        ...


@dataclass(frozen=True, slots=True)
class Work:
    """Work counters of a deployment, which only grow. ``bytes``: sent through its tunnels; ``processes``: the
    sum of `sollold.engines.llamacpp.process.Process.work` over all nodes, a few seconds old for nodes other
    than the head.
    """

    processes: int
    bytes: int


class Participants:
    """All participants of one deployment, including the head's own node.

    Args:
        model: the model on this node, the head.
        build: build of llama.cpp, which must be the same on all of them.
        lost: ends the deployment.

    Attributes:
        nodes: the participants' node ids.
    """

    def __init__(
        self,
        deployment: str,
        plan: Plan,
        model: Model,
        build: str,
        context: DeploymentContext,
        lost: OnLost,
    ) -> None:
        self.nodes = tuple(sorted(plan.bytes_by_owner()))
        self._deployment = deployment
        self._plan = plan
        self._model = model
        self._build = build
        self._context = context
        self._lost = lost
        self._tunnels: list[Tunnel] = []
        self._committed: set[str] = set()
        self._work: dict[str, int | None] = {}

    def work(self) -> int | None:
        """Return the sum of their processes' work counters as last reported; None if one is unknown."""
        parts = [self._work.get(node) for node in self.nodes]
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None

    def traffic(self) -> int:
        """Return the number of bytes sent through the tunnels in both directions."""
        return sum(tunnel.traffic.up + tunnel.traffic.down for tunnel in self._tunnels)

    async def commit_and_connect(self) -> list[WorkerAddress]:
        """Commit at every participant, then connect to every worker. Returns the workers in ``--rpc`` order.

        Raises:
            ParticipantFailed, PeerError: one does not take part; in an exception group.
            OSError: no loopback port was free for a tunnel.
            LookupError: the model's file system does not respond; in an exception group.
        """
        async with asyncio.TaskGroup() as group:
            for node in self.nodes:
                group.create_task(self._commit(node))
            reading = group.create_task(self._read_header())
        await self._fill_caches(reading.result())
        workers = []
        for node in worker_nodes(self._plan):
            if node == self._context.node:
                port = await self._context.local_worker_port(self._deployment)
            else:
                port = await self._tunnel(node)
            workers.append(WorkerAddress(node, port, worker_devices(self._plan, node)))
        for node, address, devices in external_workers(self._plan):
            if node == self._context.node:
                host, port = split_address(address)
                workers.append(WorkerAddress(node, port, devices, host))
            else:
                workers.append(WorkerAddress(node, await self._tunnel(node, address), devices))
        return workers

    async def renew(self, node: str, loaded: Callable[[], bool]) -> None:
        """Renew one participant's grant periodically, independently of the others: a slow one delays none.
        Runs until cancelled.

        Failures count only after it has answered the commit.
        """
        last_reply = time.monotonic()
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            committed = node in self._committed
            if not committed:
                last_reply = time.monotonic()
            request = Renew(self._deployment, self._context.node, loaded=loaded())
            try:
                done = await self._context.calls.call(node, "renew", request, Done, timeout=_RENEW_TIMEOUT)
            except PeerError as error:
                if committed and time.monotonic() - last_reply > GRANT_SECONDS:
                    self._lost(str(error), culprit=node)
                continue
            self._work[node] = done.work
            if not done.ok and committed:
                self._lost(f"{self._context.name(node)} ended its share: {done.reason}", culprit=node)
            last_reply = time.monotonic()

    async def release_grants(self, term: Term) -> None:
        """Close the tunnels and release all memory. Failures do not stop the rest."""
        for tunnel in self._tunnels:
            try:
                async with asyncio.timeout(_CLOSE_TIMEOUT):
                    await tunnel.close()
            except (OSError, TimeoutError, PeerError) as error:
                log.warning("a tunnel of %s did not close: %s", self._deployment, error)
        await asyncio.gather(*(self._release(node, term) for node in self.nodes))

    async def _tunnel(self, node: str, external: str = "") -> int:
        on_break = partial(self._report_break, node)
        tunnel = await self._context.tunnels.open(self._deployment, node, on_break, external)
        self._tunnels.append(tunnel)
        return tunnel.port

    def _report_break(self, node: str, reason: str) -> None:
        """Report the loss a moment later, since the worker's node may know the real reason and report it."""
        lost = partial(self._lost, reason, culprit=node)
        asyncio.get_running_loop().call_later(BREAK_SECONDS, lost)

    async def _commit(self, node: str) -> None:
        devices = worker_devices(self._plan, node)
        request = Commit(self._deployment, self._context.node, devices, self._build, self._plan.digest)
        done = await self._context.calls.call(node, "commit", request, Done, timeout=COMMIT_SECONDS)
        if not done.ok:
            raise ParticipantFailed(node, f"{self._context.name(node)} did not commit: {done.reason}")
        self._committed.add(node)

    async def _read_header(self) -> Header | None:
        """Read the header of the model's files; None if they are unreadable, which llama-server will report.

        Raises:
            LookupError: their file system does not respond: llama-server would hang, and could not be killed.
        """
        try:
            return await self._context.header(self._model)
        except (GgufError, OSError):
            return None

    async def _fill_caches(self, header: Header | None) -> None:
        """Let the other nodes fill their workers' caches from their own disks. Best effort."""
        others = [node for node in worker_nodes(self._plan) if node != self._context.node]
        if header is not None:
            await asyncio.gather(*(self._fill_cache(node, header) for node in others))

    async def _fill_cache(self, node: str, header: Header) -> None:
        wanted = wanted_tensors(self._plan, node, header, self._model.files)
        if not wanted:
            return
        digest = self._plan.digest
        sources = tuple(holder for holder in self._context.holders(digest) if holder != node)
        request = FillCache(self._deployment, self._context.node, digest, wanted, sources)
        try:
            done = await self._context.calls.call(node, "fill", request, Done, timeout=_FILL_TIMEOUT)
        except PeerError as error:
            log.info("the tensor cache is not filled on %s: %s", self._context.name(node), error)
            return
        if not done.ok:
            log.info("the tensor cache is not filled on %s: %s", self._context.name(node), done.reason)

    async def _release(self, node: str, term: Term) -> None:
        request = Release(term, self._deployment, self._context.node)
        try:
            await self._context.calls.call(node, "release", request, Done, timeout=_RELEASE_TIMEOUT)
        except PeerError as error:
            # The worker there ends when its grant expires.
            name = self._context.name(node)
            log.info("%s was not told that %s ended: %s", name, self._deployment, error)
