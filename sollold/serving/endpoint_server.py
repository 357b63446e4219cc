"""At the endpoint's node: serves requests from all nodes, with one queue per endpoint.

Often the endpoint is on the node that received the request. Then `EndpointServer.stream` is called directly;
otherwise the request comes over the peer route, in the format of `sollold.serving.protocol`.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from functools import partial
from math import inf

from aiohttp import web

from sollold import tracing
from sollold.cluster.gossip.record import Backend, Endpoint, State
from sollold.cluster.net.rpc_server import RpcServer
from sollold.cluster.net.rpc_server import caller as proved_caller
from sollold.cluster.net.view import View
from sollold.retry import LogAndRetry
from sollold.serving.admission import AdmissionQueue
from sollold.serving.byte_budget import ByteBudget
from sollold.serving.counters import Counters
from sollold.serving.engine_client import EngineClient
from sollold.serving.engine_slots import work_of_slots
from sollold.serving.engines import EngineHost, Engines
from sollold.serving.local_stream import Figures, LocalStream, crash_error, has_crashed
from sollold.serving.peer_handler import PeerRequestHandler
from sollold.serving.protocol import PATH, EngineRequest, ErrorKind, StreamError
from sollold.serving.watchdog import IdleDetector, OwnPauses
from sollold.settings.schema import ServingSettings
from sollold.turns import next_turn

log = logging.getLogger("sollold.serving")

CHECK_EVERY = 1.0
"""Interval of the checks of running requests, in seconds."""
_REPORT_SECONDS = 0.25
"""Delay for which changes of the counts are collected before the record is updated, in seconds."""
_UNREAD_SECONDS = 300.0
"""Seconds after which a caller that reads nothing loses its slot."""
_PATHS = (
    "/v1/",
    "/api/chat",
    "/api/generate",
    "/api/embed",
    "/completion",
    "/infill",
    "/embedding",
    "/rerank",
    "/tokenize",
    "/detokenize",
    "/apply-template",
)
_FULL_RETRY_SECONDS = 5.0
_PLAIN_PATH = re.compile(r"(/[A-Za-z0-9_-]+)+")
_MIN_SPEED_TOKENS = 16
"""Minimum tokens for measuring an answer's speed: the first few are faster or slower than the rest."""
_OLLAMA_SILENCE = 1200.0
"""Minimum seconds of silence granted to an Ollama that loads or does not stream: it shows no progress."""


class EndpointState:
    """An endpoint's queue, running requests and measurements."""

    def __init__(self, id: str, host: EngineHost, queue: AdmissionQueue) -> None:
        self.id = id
        self.host = host
        self.queue = queue
        self.speed = 0.0
        self.streams: set[LocalStream] = set()
        self.crowded = False
        """Whether there was more than one request in the engine at the last change."""
        self.idle = IdleDetector()
        self.asking: asyncio.Task[None] | None = None

    @property
    def endpoint(self) -> Endpoint | None:
        """The endpoint's current state; None if it is gone."""
        return self.host.endpoint(self.id)

    def suspects(self) -> list[LocalStream]:
        """The requests of which one would be the cause if the engine crashed now: those without any answer.

        If an engine has crashed with some of them before, only these. Small requests
        (`EngineRequest.bypass_queue`) count only if the engine has no others.
        """
        sent = [stream for stream in self.streams if stream.connected]
        sent = [stream for stream in sent if not stream.request.bypass_queue] or sent
        unanswered = [s for s in sent if s.progress is not None and not s.progress.began]
        return [stream for stream in unanswered if stream.request.suspect] or unanswered


class EndpointServer:
    """Serves this node's endpoints. The owner calls `start` and `close`."""

    def __init__(
        self,
        view: View,
        engines: Engines,
        settings: ServingSettings,
        peers: RpcServer | None = None,
        who: Callable[[web.Request], str] = proved_caller,
        counters: Counters | None = None,
    ) -> None:
        """Register the peer route; must be called before the peer server starts, and `start` on the loop.

        ``who``: returns the node id of a peer request's caller.
        """
        self._peer_requests = PeerRequestHandler(self.stream, who)
        self._counters = counters or Counters()
        self._view = view
        self._engines = engines
        self._settings = settings
        self._bodies = ByteBudget(settings.bodies)
        self._states: dict[str, EndpointState] = {}
        self._client: EngineClient | None = None
        self._checks: asyncio.Task[None] | None = None
        self._unsubscribe: Callable[[], None] = lambda: None
        self._reports: dict[str, asyncio.TimerHandle] = {}
        self._refusing = ""
        self._work = asyncio.Event()
        """Set when a request has arrived, so that there is something to check."""
        if peers is not None:
            peers.route("POST", PATH, self._peer_requests.answer)

    async def start(self) -> None:
        """Start watching the cluster's records and checking running requests."""
        self._client = EngineClient()
        self._unsubscribe = self._view.subscribe(self._record_changed)
        self._checks = asyncio.create_task(self._check_periodically(), name="serving checks")

    async def close(self) -> None:
        """End all requests."""
        self.refuse("this node is stopping")
        self.abort_all("this node is stopping")
        self._unsubscribe()
        tasks = self._peer_requests.tasks()
        tasks += [state.asking for state in self._states.values() if state.asking is not None]
        if self._checks is not None:
            self._checks.cancel()
            tasks.append(self._checks)
        if tasks:
            # An aborted stream ends its task by itself; the timeout is for callers that read nothing.
            _, slow = await asyncio.wait(tasks, timeout=2.0)
            for task in slow:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for timer in self._reports.values():
            timer.cancel()
        self._reports.clear()
        if self._client is not None:
            self._client.close()

    @property
    def under_way(self) -> int:
        """Number of requests in this node's queues and engines."""
        return sum(len(state.streams) for state in self._states.values())

    def use_settings(self, settings: ServingSettings) -> None:
        """Apply changed settings, except the length of existing queues and the limit on request bodies."""
        self._settings = settings

    def refuse(self, reason: str) -> None:
        """Accept no requests and send waiting ones elsewhere; with an empty ``reason`` accept them again.

        Closed queues reopen at the next change of the records.
        """
        self._refusing = reason
        if reason:
            for state in self._states.values():
                state.queue.dismiss()

    def abort_all(self, reason: str) -> None:
        """Abort all requests, so that their callers' nodes resume them elsewhere."""
        for state in self._states.values():
            for stream in tuple(state.streams):
                stream.abort(StreamError(ErrorKind.MOVED, reason))

    def stream(self, request: EngineRequest) -> LocalStream:
        """Return a stream, not yet opened, for a request to an endpoint of this node.

        Raises:
            StreamError: MOVED if the endpoint accepts no requests here; FULL; ENGINE for a forbidden path.
        """
        if self._refusing:
            raise StreamError(ErrorKind.MOVED, self._refusing)
        host = self._engines.of(request.endpoint)
        endpoint = host.endpoint(request.endpoint)
        if endpoint is None or self._client is None:
            raise StreamError(ErrorKind.MOVED, f"{request.endpoint} is not served here")
        if endpoint.state is not State.READY:
            raise StreamError(ErrorKind.MOVED, f"{request.endpoint} is {endpoint.state}")
        if endpoint.closing:
            raise StreamError(ErrorKind.MOVED, f"a node that {request.endpoint} needs is draining")
        if not request.path.startswith(_PATHS) or not _PLAIN_PATH.fullmatch(request.path):
            raise StreamError(ErrorKind.ENGINE, f"endpoints do not serve the path {request.path}")
        size = len(request.body)
        if not self._bodies.reserve(size, holder=request.client):
            message = "the requests queued on this node already hold too much memory; try again later"
            raise StreamError(ErrorKind.FULL, message, _FULL_RETRY_SECONDS)
        state = self._state(endpoint, host)
        traced = self._traced(request, endpoint) if tracing.on() else None

        def ended(stream: LocalStream) -> None:
            if traced is not None:
                if stream.head is not None:
                    traced.set({"sollold.queue_ms": stream.head.queue_ms})
                traced.end(stream.failure)
            state.streams.discard(stream)
            self._bodies.release(size, request.client)

        stream = LocalStream(
            request,
            state.queue,
            host,
            self._client,
            stall=self._stall_limit(request, endpoint),
            # Ollama loads first, in silence, and gives up by itself if that makes no progress.
            begin=_OLLAMA_SILENCE if endpoint.backend is Backend.OLLAMA and not endpoint.loaded else 0.0,
            speed=state.speed or endpoint.speed,
            on_speed=partial(self._measured, state),
            on_end=ended,
            suspects=state.suspects,
        )
        state.streams.add(stream)
        self._work.set()
        return stream

    def _traced(self, request: EngineRequest, endpoint: Endpoint) -> tracing.Traced:
        facts = {"gen_ai.request.model": endpoint.model, "sollold.endpoint": endpoint.id}
        facts |= {"sollold.request": request.id, "url.path": request.path}
        return tracing.begin("engine", facts, request.trace)

    def has_slot(self, endpoint: str) -> bool:
        """Whether a new request to the endpoint would not have to wait."""
        state = self._states.get(endpoint)
        return state is None or state.queue.free

    def _stall_limit(self, request: EngineRequest, endpoint: Endpoint) -> float:
        stall = self._settings.stall
        if stall > 0 and endpoint.backend is Backend.OLLAMA and not request.stream:
            return max(stall, _OLLAMA_SILENCE)
        return stall

    def _state(self, endpoint: Endpoint, host: EngineHost) -> EndpointState:
        state = self._states.get(endpoint.id)
        if state is None:
            queue = AdmissionQueue(
                endpoint.slots, self._settings.queue, partial(self._counts_changed, endpoint.id)
            )
            state = self._states[endpoint.id] = EndpointState(endpoint.id, host, queue)
        return state

    def _record_changed(self) -> None:
        self._peer_requests.end_all_but({record.node for record in self._view.live()})
        for id, state in tuple(self._states.items()):
            endpoint = state.endpoint
            if endpoint is not None and endpoint.state is State.READY:
                if endpoint.closing:
                    state.queue.dismiss()
                else:
                    state.queue.resize(endpoint.slots)
                continue
            # It is ending. An engine that is shutting down may keep its streams open in silence.
            state.queue.dismiss()
            reason = endpoint.reason if endpoint is not None else ""
            failed = endpoint is not None and endpoint.state is State.FAILED
            kind = ErrorKind.ENGINE if failed else ErrorKind.MOVED
            suspects = state.suspects() if endpoint is not None and has_crashed(endpoint) else []
            message = f"the engine was ended{f': {reason}' if reason else ''}"
            forced = endpoint is not None and endpoint.forced
            for stream in tuple(state.streams):
                stream.abort(crash_error(StreamError(kind, message, forced=forced), stream, suspects))
            if endpoint is None and not state.streams:
                del self._states[id]

    def _counts_changed(self, id: str) -> None:
        state = self._states.get(id)
        if state is not None:
            crowded = state.queue.active > 1
            if crowded and not state.crowded:
                # Those that come later notice it themselves.
                for stream in state.streams:
                    stream.alone = stream.alone and stream.progress is None
            state.crowded = crowded
        if id not in self._reports:
            loop = asyncio.get_running_loop()
            self._reports[id] = loop.call_later(_REPORT_SECONDS, self._report, id)

    def _report(self, id: str) -> None:
        self._reports.pop(id, None)
        state = self._states.get(id)
        if state is not None:
            state.host.report(id, state.queue.active, state.queue.waiting, state.speed)
        else:
            # Its last requests ended with it. It may return: an Ollama keeps its endpoints' ids.
            self._engines.of(id).report(id, 0, 0, 0.0)

    def _measured(self, state: EndpointState, stream: LocalStream, figures: Figures) -> None:
        """Update the counters and the speed, which is that of a single stream: concurrent ones are slower."""
        speed, tokens = figures.speed, figures.tokens
        self._counters.generated(tokens, speed)
        state.host.answered(state.id, tokens, figures.drafted, figures.accepted)
        if tokens < _MIN_SPEED_TOKENS or not (stream.alone or 0 < state.speed < speed):
            return
        state.speed += (0.3 if state.speed else 1.0) * (speed - state.speed)
        self._counts_changed(state.id)

    # Checks once a second for disconnected callers and hung engines.

    async def _check_periodically(self) -> None:
        loop = asyncio.get_running_loop()
        pauses = OwnPauses(loop.time())
        retrying = LogAndRetry("the check of running requests", log)
        while True:
            await next_turn(CHECK_EVERY)
            now = loop.time()
            pauses.check((s.progress for state in self._states.values() for s in state.streams), now)
            with retrying:
                self._peer_requests.check(now)
                if self._client is not None:
                    self._client.close_idle()
                for state in tuple(self._states.values()):
                    self._check(state, now)
            if self._is_idle():
                self._work.clear()
                await self._work.wait()
                pauses.rested(loop.time())

    def _is_idle(self) -> bool:
        """Whether there is nothing to check until the next request."""
        connections = len(self._client) if self._client is not None else 0
        return not (self.under_way or connections or self._peer_requests.tasks())

    def _check(self, state: EndpointState, now: float) -> None:
        working = [
            stream
            for stream in state.streams
            if stream.progress is not None and not stream.request.bypass_queue
        ]
        work = state.host.work(state.id) if working else None
        if work is None:
            state.idle.forget()
        else:
            state.idle.observe(work.processes, work.bytes, now)
        if not state.streams:
            if state.endpoint is None:
                self._states.pop(state.id, None)
            return
        still = self._settings.still if self._settings.still > 0 else inf
        idle = state.idle.seconds(now) > still
        for stream in working:
            progress = stream.progress
            if progress is None:
                continue
            stuck = idle and progress.waited(now) > still
            if stuck or progress.hung(now):
                seconds = progress.silent(now)
                reason = f"the engine produced no token for {seconds:.0f} s although its process runs"
                if stuck:
                    reason += ", and none of its processes used any CPU"
                log.warning("%s", reason, extra={"deployment": state.id, "request": stream.request.id})
                self._fail(state, reason)
                return
            if progress.unread(now) > _UNREAD_SECONDS:
                # It resumes when the caller reads again.
                stream.abort(StreamError(ErrorKind.MOVED, "the client did not read for a long time"))
        doubtful = any(stream.progress is not None and stream.progress.doubtful(now) for stream in working)
        if doubtful and (state.asking is None or state.asking.done()):
            state.asking = asyncio.create_task(self._ask_engine(state), name=f"slots of {state.id}")

    def _fail(self, state: EndpointState, reason: str) -> None:
        # Before the slots are freed, for which others wait.
        state.queue.dismiss()
        for stream in tuple(state.streams):
            stream.abort(StreamError(ErrorKind.ENGINE, reason))
        state.host.fail(state.id, reason)

    async def _ask_engine(self, state: EndpointState) -> None:
        """Ask llama-server for its progress: its slots may have worked without any output yet."""
        engine, endpoint = state.host.address(state.id), state.endpoint
        if engine is None or endpoint is None or endpoint.backend is Backend.OLLAMA or self._client is None:
            return
        work = await work_of_slots(self._client, engine)
        if work is None:
            return
        now = asyncio.get_running_loop().time()
        for stream in tuple(state.streams):
            if stream.progress is not None:
                stream.progress.worked(work, now)
