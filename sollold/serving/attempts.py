"""Sends a request to endpoints: one attempt each, until one begins to answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgspec

from sollold import tracing
from sollold.cluster.net.acceptor import is_loopback
from sollold.cluster.net.view import endpoint_at
from sollold.errors import Fault, Refusal, unloaded_by_force
from sollold.serving.candidate import EndpointCandidate, EndpointQuery, ScoredCandidate
from sollold.serving.engine_deaths import EngineDeaths
from sollold.serving.engine_error import engine_refusal, is_callers_fault, runner_crashed
from sollold.serving.opening import ServingContext, StreamOpening
from sollold.serving.protocol import EngineRequest, ErrorKind, StreamError
from sollold.serving.request import Ask, Call, Engine, Routing, Waiting
from sollold.serving.routing import routing_of, warnings_of
from sollold.serving.stream import Stream, whole

log = logging.getLogger("sollold.serving")

_RECHECK_SECONDS = 0.25
"""Interval of looking for a better endpoint while waiting in a queue, in seconds."""
BYPASS_PATHS = ("/tokenize", "/detokenize", "/apply-template", "/v1/chat/completions/input_tokens")
"""Paths of small requests, which need no slot of the engine."""
BYPASS_LIMIT = 20.0
"""Timeout for the beginning of the response to such a request, and for reading it, in seconds."""


class Attempt(msgspec.Struct, frozen=True):
    """An engine's answer in progress. A request has one, and another one after each fault."""

    choice: ScoredCandidate
    candidate: EndpointCandidate
    stream: Stream
    call: Call


class EndpointRefusal(Refusal):
    """One endpoint refused the request; another may take it."""


class Attempts:
    """The attempts of one request.

    Attributes:
        came: when the request arrived, on the loop's clock.
        deaths: the engines that died with it.
    """

    def __init__(self, ask: Ask, on_wait: Callable[[Waiting], None], context: ServingContext) -> None:
        self._ask = ask
        self._on_wait = on_wait
        self._context = context
        self._loop = asyncio.get_running_loop()
        self.came = self._loop.time()
        self.deaths = EngineDeaths(ask, context.quarantine, context.view)
        self._sent = 0
        self._extra = {"request": ask.id}

    async def begin(
        self,
        choice: ScoredCandidate,
        call: Call,
        query: EndpointQuery,
        stage: str = "",
        *,
        bypass_queue: bool = False,
    ) -> Attempt | EndpointCandidate:
        """Send the request to one endpoint. ``bypass_queue``: take no slot, as for all `BYPASS_PATHS`.

        Returns the attempt; or a better candidate, found while the request waited in the queue.

        Raises:
            StreamError: the endpoint failed; another should be tried.
            EndpointRefusal: the endpoint refused; to be reported if no other accepts the request.
            Refusal: no endpoint would answer this.
        """
        router, candidate = self._context.router, choice.candidate
        request = await self._request(candidate, call, bypass_queue)
        began = self._loop.time()
        router.sent(candidate.key, query, began)
        opening = StreamOpening(self._context, candidate, request, self._on_wait, stage or "queued")
        opening.tell_start()
        ok: bool | None = None
        try:
            stream = await opening.open_at_once() or await self._opened(opening, query)
            if not isinstance(stream, EndpointCandidate):
                refusal = await _refusal_of(stream)
        except StreamError as error:
            if error.transport:
                router.failed(candidate.key, self._loop.time())
                ok = False
            router.ended(candidate.key, ok)
            # It may have broken off in the middle of an error response.
            await opening.cancel()
            raise self._opening_error(error) from None
        except BaseException:
            # First, since the next step may be cancelled as well.
            router.ended(candidate.key, None)
            await opening.cancel()
            raise
        finally:
            opening.leave_queue()
        if isinstance(stream, EndpointCandidate):
            router.ended(candidate.key, None)
            router.ended(stream.key, None)
            return stream
        router.began(candidate.key, self._loop.time() - began)
        if refusal is not None:
            await stream.close()
            router.ended(candidate.key, is_callers_fault(refusal))
            # A crash while loading is caused by the model, not by the request.
            if candidate.endpoint.loaded and runner_crashed(refusal.message):
                if not self.is_cause(stream):
                    raise StreamError(ErrorKind.ENGINE, refusal.message, taken=True, suspect=True)
                self.deaths.add_crash(refusal.message)
                self.deaths.check()
            raise _engine_exception(refusal, candidate.engine)
        return Attempt(choice, candidate, stream, call)

    async def _request(self, candidate: EndpointCandidate, call: Call, bypass_queue: bool) -> EngineRequest:
        ask, fields = self._ask, call.body
        if candidate.engine is Engine.OLLAMA:
            # It must be asked by its own name for the model; see `callers_name`.
            fields = {**fields, "model": candidate.endpoint.model}
        body = msgspec.json.encode(fields)
        if ask.media is not None:
            body = await ask.media.put_back(body)
        now = self._loop.time()
        remaining = max(self.came + ask.deadline - now, 0.001) if ask.deadline > 0 else 0.0
        self._sent += 1
        return EngineRequest(
            # Unique per attempt: at an endpoint tried before, the previous one may not have been removed yet.
            id=ask.id if self._sent == 1 else f"{ask.id}.{self._sent}",
            endpoint=candidate.endpoint.id,
            path=call.path,
            body=body,
            stream=ask.stream,
            priority=ask.priority,
            client=self._client(),
            age=now - self.came,
            deadline=remaining,
            keep_alive=ask.keep_alive,
            bypass_queue=bypass_queue or call.path in BYPASS_PATHS,
            suspect=self.deaths.suspect,
            trial=self.deaths.trial,
            trace=tracing.traceparent(),
        )

    def is_cause(self, stream: Stream) -> bool:
        """Whether the request must be the cause of a crash of the Ollama's runner that ``stream`` reports."""
        return self.deaths.suspect or stream.head is None or stream.head.alone

    def _client(self) -> str:
        """The caller's identity in the queue of an endpoint, which has requests from all nodes."""
        client = self._ask.client
        if is_loopback(client.removeprefix("::ffff:")):
            # Programs on other machines have the same address.
            return f"{self._context.view.me.node}:{client}"
        return client

    async def _opened(self, opening: StreamOpening, query: EndpointQuery) -> Stream | EndpointCandidate:
        """Return the stream; or, while the request is queued, another endpoint that is free and now claimed.

        Raises:
            StreamError: the endpoint failed.
            Refusal: an equal request crashed an engine meanwhile.
        """
        router, view = self._context.router, self._context.view
        began, key = self._loop.time(), opening.candidate.key
        while not await opening.wait(_RECHECK_SECONDS):
            if opening.request.bypass_queue and self._loop.time() - began > BYPASS_LIMIT:
                await opening.cancel()
                raise StreamError(ErrorKind.DEADLINE, "the engine does not answer a small request")
            if not opening.queued:
                continue
            self.deaths.check()
            if opening.request.suspect:
                # It stays with the others: see `Dispatcher`.
                continue
            better = router.better(view.live(), query, self._loop.time(), key)
            if better is not None:
                # Claim it before the next await: other queued requests compete for it.
                router.sent(better.key, query, self._loop.time())
                try:
                    await opening.cancel()
                except BaseException:
                    router.ended(better.key, None)
                    raise
                return better
        return opening.stream()

    def _opening_error(self, error: StreamError) -> Exception:
        """Return the exception to raise for a stream that could not be opened."""
        if error.kind is ErrorKind.FULL:
            retry_after = max(1.0, error.retry_after)
            return EndpointRefusal(Fault.UNAVAILABLE, error.message, retry_after=retry_after)
        if error.kind is ErrorKind.DEADLINE:
            return Refusal(Fault.TIMEOUT, error.message)
        if error.forced:
            return unloaded_by_force(self._ask.model)
        log.info("an endpoint did not answer: %s", error, extra=self._extra)
        return error

    def routing(self, attempt: Attempt, query: EndpointQuery, load_ms: float) -> Routing:
        """Return where the answer comes from. ``load_ms``: time that loading the model took."""
        view, candidate = self._context.view, attempt.candidate
        routing = routing_of(query.model, candidate.record, candidate.endpoint, view.live())
        routing.warnings += attempt.call.notes + warnings_of(self._ask, query, candidate)
        routing.load_ms = load_ms
        head = attempt.stream.head
        # An endpoint counts from the request's arrival, so it includes the load.
        routing.queue_ms = max(0.0, head.queue_ms - load_ms) if head is not None else 0.0
        if self._ask.explain:
            others = self._context.router.rank(
                view.live(), query, self._loop.time(), frozenset((candidate.key,))
            )
            routing.scores = tuple(
                ("/".join(choice.candidate.key), choice.score, choice.why)
                for choice in (attempt.choice, *others)
            )
        return routing

    def context_of(self, attempt: Attempt, query: EndpointQuery) -> int:
        """Return the context with which an Ollama generates this answer, in tokens; 0: unknown."""
        if query.context and attempt.call.path.startswith("/api/"):
            return query.context  # Its other APIs take none.
        endpoint = endpoint_at(self._context.view, *attempt.candidate.key)
        return endpoint.context if endpoint is not None else 0

    async def release(self, attempt: Attempt, ok: bool | None) -> None:
        """Close ``attempt``. ``ok`` None: it showed nothing about the endpoint."""
        self._context.router.ended(attempt.candidate.key, ok)
        await attempt.stream.close()

    async def release_failed(self, attempt: Attempt, error: StreamError) -> None:
        """Close ``attempt``, which failed with ``error``."""
        self.deaths.add(attempt.candidate.key, error)
        if error.transport:
            self._context.router.failed(attempt.candidate.key, self._loop.time())
        await self.release(attempt, False if error.transport else None)


async def _refusal_of(stream: Stream) -> Refusal | None:
    """Return the engine's own error if its status is 400 or higher, else None.

    Raises:
        StreamError: the error response broke off.
    """
    status = stream.head.status if stream.head is not None else 0
    if status < 400:
        return None
    return engine_refusal(status, await whole(stream, limit=1024 * 1024))


def _engine_exception(refusal: Refusal, engine: Engine) -> Exception:
    """Return the exception to raise for an engine's error, by whether another endpoint may answer."""
    if refusal.status == 503:
        return StreamError(ErrorKind.MOVED, refusal.message)
    # One Ollama may lack the memory, or have lost the model, while another endpoint can answer.
    if engine is Engine.OLLAMA and (refusal.status >= 500 or refusal.status == 404):
        return EndpointRefusal(refusal.fault, refusal.message, status=refusal.status)
    return refusal
