"""Opens a stream from an endpoint; while queued there, the request may look for another endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import field

from sollold.cluster.net.rpc_client import RpcClient
from sollold.cluster.net.view import View
from sollold.facts import dataclass
from sollold.serving.candidate import EndpointCandidate
from sollold.serving.endpoint_server import EndpointServer
from sollold.serving.engine_deaths import Quarantine
from sollold.serving.loader import Loader
from sollold.serving.local_stream import LocalStream
from sollold.serving.protocol import EngineRequest
from sollold.serving.remote_stream import RemoteStream
from sollold.serving.request import Waiting
from sollold.serving.router import Router
from sollold.serving.stream import Stream
from sollold.settings.schema import HttpSettings, ServingSettings


@dataclass(frozen=True, slots=True)
class ServingContext:
    """The parts and settings with which requests are answered."""

    view: View
    calls: RpcClient
    server: EndpointServer
    loader: Loader
    router: Router
    waiters: QueueWaiters
    quarantine: Quarantine
    serving: ServingSettings
    http: HttpSettings


@dataclass(slots=True)
class QueueWaiters:
    """This node's requests that wait in the queues of endpoints, in order of arrival."""

    _nudges: dict[asyncio.Future[None], tuple[str, str]] = field(default_factory=dict)

    def add(self, endpoint: tuple[str, str]) -> asyncio.Future[None]:
        """Add a request that waits for ``endpoint``. The future is done when it should look for another."""
        nudge: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._nudges[nudge] = endpoint
        return nudge

    def remove(self, nudge: asyncio.Future[None]) -> None:
        """Remove a request that no longer waits."""
        self._nudges.pop(nudge, None)

    def freed(self, endpoint: tuple[str, str]) -> None:
        """After the end of a request at ``endpoint``: notify the first request that waits elsewhere."""
        for nudge, waits_for in self._nudges.items():
            if waits_for != endpoint:
                del self._nudges[nudge]
                if not nudge.done():
                    nudge.set_result(None)
                return


class StreamOpening:
    """Opens one stream, at an endpoint of this node or of another."""

    def __init__(
        self,
        context: ServingContext,
        candidate: EndpointCandidate,
        request: EngineRequest,
        on_wait: Callable[[Waiting], None],
        stage: str,
    ) -> None:
        self.candidate = candidate
        self.request = request
        self._context = context
        self._local = candidate.record.node == context.view.me.node
        self._waiters = context.waiters
        self._on_wait = on_wait
        self._stage = stage
        self._nudge: asyncio.Future[None] | None = None
        """Done when another endpoint may have become free; None unless the request is queued."""
        self._task: asyncio.Future[Stream] | None = None
        self._stream: LocalStream | RemoteStream | None = None

    @property
    def queued(self) -> bool:
        """Whether the request waits in the endpoint's queue. Once admitted, it stays with its engine."""
        return self._nudge is not None

    async def open_at_once(self) -> Stream | None:
        """Open the stream, in this task. Return None if the request waits in a queue, or should not wait long
        for an engine (`EngineRequest.bypass_queue`): then call `wait`.

        Raises:
            StreamError: it could not be opened.
        """
        context, request = self._context, self.request
        if request.bypass_queue:
            return None
        if self._local:
            if request.suspect or not context.server.has_slot(request.endpoint):
                return None
            return await self._open()
        stream = self._stream = RemoteStream(context.calls, self.candidate.record, request)
        await stream.open(self._on_position, wait=False)
        return stream if stream.head is not None else None

    async def _open(self) -> Stream:
        context, record, stream = self._context, self.candidate.record, self._stream
        if stream is None:
            if self._local:
                stream = context.server.stream(self.request)
            else:
                stream = RemoteStream(context.calls, record, self.request)
            self._stream = stream
        await stream.open(self._on_position)
        return stream

    def tell_start(self) -> None:
        """Report that an engine may now have the request: without streaming nothing arrives until the end."""
        if self._stage == "queued":
            self._on_wait(Waiting("answering", node=self.candidate.record.name))

    def _on_position(self, position: int) -> None:
        if not position:
            self.leave_queue()
            self.tell_start()
            return
        self._nudge = self._nudge or self._waiters.add(self.candidate.key)
        self._on_wait(Waiting(self._stage, position=position))

    async def wait(self, seconds: float) -> bool:
        """Wait until it is open or failed, or another endpoint may be free, at most ``seconds``.

        Returns whether it is open or failed.
        """
        nudge = self._nudge
        task = self._task = self._task or asyncio.ensure_future(self._open())
        futures = (task,) if nudge is None else (task, nudge)
        await asyncio.wait(futures, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if nudge is not None and nudge is self._nudge and nudge.done() and not task.done():
            self._nudge = self._waiters.add(self.candidate.key)
        return task.done()

    def stream(self) -> Stream:
        """Return the open stream.

        Raises:
            StreamError: it could not be opened.
        """
        assert self._task is not None
        return self._task.result()

    async def cancel(self) -> None:
        """Cancel the opening; close the stream if it is open already."""
        try:
            if self._task is not None:
                self._task.cancel()
                await asyncio.gather(self._task, return_exceptions=True)
        finally:
            # Not closed by a task that was cancelled before its start.
            if self._stream is not None:
                await self._stream.close()

    def leave_queue(self) -> None:
        """Stop looking for other endpoints."""
        nudge, self._nudge = self._nudge, None
        if nudge is not None:
            self._waiters.remove(nudge)
