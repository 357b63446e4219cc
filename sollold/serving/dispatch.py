"""Finding an engine that begins to answer: choose an endpoint or get one loaded, wait for a slot, begin."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace

import msgspec

from sollold import tracing
from sollold.cluster.net.view import next_change
from sollold.errors import Fault, Refusal
from sollold.facts import dataclass
from sollold.serving.candidate import EndpointCandidate, EndpointQuery, ScoredCandidate
from sollold.serving.context_size import LEAST_ANSWER_TOKENS, larger_context, too_long
from sollold.serving.engine_deaths import EngineDeaths
from sollold.serving.engine_error import engine_refusal, is_callers_fault, runner_crashed
from sollold.serving.event_split import whole
from sollold.serving.loader import Need, Ready, ensure_of, with_ready
from sollold.serving.local_stream import Stream
from sollold.serving.model_names import body_for
from sollold.serving.opening import ServingContext, StreamOpening
from sollold.serving.protocol import EngineRequest, ErrorKind, StreamError
from sollold.serving.request import Ask, Call, Engine, Waiting

log = logging.getLogger("sollold.serving")

_RETHINK = 0.25
"""Seconds between two looks for a better endpoint while waiting in a queue."""
BYPASS_PATHS = ("/tokenize", "/detokenize", "/apply-template", "/v1/chat/completions/input_tokens")
"""Small requests that an engine answers beside its work."""
BYPASS_LIMIT = 20.0
"""Seconds in which an engine must have begun to answer such a request."""
_AGAIN = 0.3
"""Seconds before endpoints that failed just now are asked again."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """An engine's answer under way: a request has one, and after each fault another."""

    choice: ScoredCandidate
    stream: Stream
    call: Call

    @property
    def candidate(self) -> EndpointCandidate:
        """The endpoint."""
        return self.choice.candidate


class EndpointRefusal(Refusal):
    """One endpoint refused the request; another may take it."""


@dataclass(slots=True)
class _Search:
    """The state of one search for an engine, over all its attempts.

    Attributes:
        limit: seconds that waiting may take, from ``began`` on.
        stage: what waiting is called, for an answer that is under way already; empty: by its own name.
        tried: endpoints that failed; they are asked again only when there is no other.
        preferred: an endpoint that was seen to be free while the request waited elsewhere.
        ready: what the leader named; the record that says so may still be on its way here.
        loaded: the leader was asked just now.
        refusal: an endpoint's; raised when no other takes the request.
        full: why the last queue took no more.
        too_long: an engine refused the prompt as too long, and one with more context is looked for.
    """

    query: EndpointQuery
    calls: dict[Engine, Call]
    limit: float
    began: float
    stage: str
    tried: set[tuple[str, str]]
    preferred: tuple[str, str] = ("", "")
    ready: Ready | None = None
    loaded: bool = False
    refusal: Refusal | None = None
    full: str = ""
    too_long: Refusal | None = None


class Dispatcher:
    """Finds engines for one request, at first and after each fault."""

    def __init__(
        self, ask: Ask, query: EndpointQuery, on_wait: Callable[[Waiting], None], context: ServingContext
    ) -> None:
        self._ask = ask
        self._query = query
        self._on_wait = on_wait
        self._context = context
        self._loop = asyncio.get_running_loop()
        self.came = self._loop.time()
        self.load_ms = 0.0
        self._sent = 0
        self._progressed = 0.0
        """When a load that is waited for after a fault last went forward, and how far it was then."""
        self._furthest = 0.0
        self.deaths = EngineDeaths(ask, context.quarantine, context.view)
        self._extra = {"request": ask.id}

    async def find(
        self,
        calls: dict[Engine, Call],
        limit: float,
        stage: str = "",
        without: frozenset[tuple[str, str]] = frozenset(),
    ) -> Attempt:
        """An engine that has begun to answer.

        ``stage``: what waiting is called, when not by its own name, for an answer that is under way already;
        ``without``: endpoints that failed just now and are asked only when there is no other.

        Raises:
            Refusal: as its fault says.
        """
        query, engines = self._query, frozenset(calls)
        if query.engines != engines:
            query = replace(query, engines=engines)
        search = _Search(query, calls, limit, self._loop.time(), stage, set(without))
        self._furthest = 0.0
        while True:
            self.deaths.check()
            choice = self._best(search)
            if choice is None:
                await self._get_endpoint(search)
                continue
            search.loaded = False
            attempt = await self._try(choice, search)
            if attempt is not None:
                return attempt

    def _best(self, search: _Search) -> ScoredCandidate | None:
        now = self._loop.time()
        records = self._context.view.live()
        if search.ready is not None:
            records = with_ready(records, search.ready)
        tried, explain = frozenset(search.tried), self._ask.explain
        ranked = self._context.router.rank(records, search.query, now, tried, score_sole=explain)
        preferred, search.preferred = search.preferred, ("", "")
        for choice in ranked:
            if choice.candidate.key == preferred:
                return choice
        return ranked[0] if ranked else None

    async def _try(self, choice: ScoredCandidate, search: _Search) -> Attempt | None:
        """The endpoint's answer; None when another is to be tried."""
        candidate = choice.candidate
        call = search.calls[candidate.engine]
        try:
            answer = await self.enter(choice, call, search.query, search.stage)
        except StreamError as error:
            search.tried.add(candidate.key)
            if call.path not in BYPASS_PATHS:
                self.deaths.add(candidate.key, error)
        except EndpointRefusal as refusal:
            search.tried.add(candidate.key)
            # An answer under way is not sent away by a full queue: it asks again until the limit.
            if search.stage and refusal.fault is Fault.UNAVAILABLE:
                search.full = refusal.message.removesuffix("; try again later")
            else:
                search.refusal = refusal
        except Refusal as refusal:
            if not self._looks_for_more_context(search, candidate, refusal):
                raise
        else:
            if isinstance(answer, Attempt):
                return answer
            search.preferred = answer.key
            self._context.router.ended(answer.key, None)
        return None

    def _looks_for_more_context(
        self, search: _Search, candidate: EndpointCandidate, refusal: Refusal
    ) -> bool:
        """Whether the prompt is too long for the endpoint, and one with more context is looked for.

        Only where the caller named none: a context that is named is kept to.

        Raises:
            Refusal: with more context it is still too long.
        """
        query = search.query
        if search.too_long is not None:
            raise too_long(refusal, "more context does not fit")
        if query.context or query.embedding or candidate.engine is not Engine.LLAMA:
            return False
        needed = larger_context(refusal, search.calls[Engine.LLAMA].body, query.trained)
        if needed <= candidate.endpoint.context:
            return False
        log.info("%s: %d tokens of context are asked for", refusal, needed, extra=self._extra)
        search.query = replace(query, context=needed, engines=frozenset((Engine.LLAMA,)), told=("", ""))
        search.too_long, search.loaded = refusal, False
        return True

    def _settles_for_less(self, search: _Search, refusal: Refusal) -> bool:
        """Whether less room for the answer is tried, since as much as wanted does not fit."""
        query, body = search.query, search.calls[Engine.LLAMA].body
        least = larger_context(refusal, body, query.trained, LEAST_ANSWER_TOKENS)
        if least >= query.context:
            return False
        search.query, search.loaded = replace(query, context=least, told=("", "")), False
        return True

    async def _get_endpoint(self, search: _Search) -> None:
        """No endpoint can be asked: have one loaded, or wait until those that failed may be asked again.

        Raises:
            Refusal: as its fault says.
        """
        view = self._context.view
        if search.refusal is not None:
            await self._shard_instead(search, search.refusal)
            return
        search.began = max(search.began, self._progressed)
        if self._loop.time() - search.began > search.limit:
            raise self._too_long(search.limit, search.full or "it could not be reached")
        search.ready = None
        if search.tried:
            # The record still calls READY what does not answer: give its node time to notice.
            await next_change(view, _AGAIN)
            search.tried.clear()
            return
        if search.loaded:
            # The leader knows one that is READY; here it is not known yet, or not reachable.
            await next_change(view, _AGAIN)
        try:
            search.ready = ready = await self._load(search)
        except Refusal as refusal:
            if search.too_long is None or refusal.fault is not Fault.TOO_BIG:
                raise
            if self._settles_for_less(search, search.too_long):
                return
            raise too_long(search.too_long, refusal.message) from None
        search.loaded = True
        if ready is None:
            return
        search.query = replace(search.query, told=(ready.node, ready.endpoint.id))
        context = ready.endpoint.context
        if 0 < context < max(search.query.context, search.query.usual):
            if search.too_long is not None and context < search.query.context:
                if self._settles_for_less(search, search.too_long):
                    return
                raise too_long(search.too_long, "; ".join(ready.reasons) or "more context does not fit")
            # More than the model was trained with, or than fits: the leader gives what there is.
            search.query = replace(
                search.query,
                context=min(context, search.query.context),
                usual=min(context, search.query.usual),
            )

    async def _shard_instead(self, search: _Search, refusal: Refusal) -> None:
        """An Ollama that has the model can't hold it, or fails: the machines together may.

        Raises:
            Refusal: they can't, or it was no fault of an Ollama.
        """
        fails = refusal.fault is Fault.ENGINE and (refusal.status >= 500 or refusal.status == 404)
        if not fails or search.query.engines != frozenset((Engine.LLAMA, Engine.OLLAMA)):
            raise refusal
        search.query = replace(search.query, engines=frozenset((Engine.LLAMA,)), told=("", ""))
        search.refusal = None
        log.info("an Ollama refused; asking the leader: %s", refusal, extra=self._extra)
        try:
            search.ready = await self._load(search)
        except Refusal as other:
            # Why it does not fit says more than what Ollama could not do; nothing else does.
            raise other if other.fault is Fault.TOO_BIG else refusal from None
        search.loaded = True

    async def _load(self, search: _Search) -> Ready | None:
        began, stage = self._loop.time(), search.stage
        # A stream that was interrupted waits for as long as its model's load goes forward.
        waited = began - search.began
        left = max(0.0, search.limit - waited)
        ensure = ensure_of(search.query, self._ask.keep_alive)
        need = Need(ensure, left, begun=bool(stage), waited=waited)
        on_wait = self._on_wait
        if stage:

            def on_wait(waiting: Waiting) -> None:
                if waiting.progress > self._furthest:
                    self._furthest, self._progressed = waiting.progress, self._loop.time()
                self._on_wait(Waiting(stage, waiting.progress, waiting.position, waiting.message))

        with tracing.span("load", {"gen_ai.request.model": search.query.model}) as span:
            ready = await self._context.loader.ready(need, on_wait)
            if ready is not None:
                span.set(
                    {"sollold.deployment": ready.endpoint.id, "sollold.reasons": "; ".join(ready.reasons)}
                )
        self.load_ms += (self._loop.time() - began) * 1000
        return ready

    async def enter(
        self,
        choice: ScoredCandidate,
        call: Call,
        query: EndpointQuery,
        stage: str = "",
        *,
        bypass_queue: bool = False,
    ) -> Attempt | EndpointCandidate:
        """Ask one endpoint. ``bypass_queue``: it needs no slot, as the requests of `BYPASS_PATHS` need none.

        Returns the attempt; or a better candidate, found while it waited in the queue, and claimed already.

        Raises:
            StreamError: the endpoint failed; another should be tried.
            EndpointRefusal: the endpoint refused; it is the answer when no other takes the request.
            Refusal: no endpoint would answer this.
        """
        router, candidate = self._context.router, choice.candidate
        request = await self._request(candidate, call, bypass_queue)
        began = self._loop.time()
        router.sent(candidate.key, query, began)
        opening = StreamOpening(self._context, candidate, request, self._on_wait, stage or "queued")
        ok: bool | None = None
        try:
            stream = await self._opened(opening, query)
            if not isinstance(stream, EndpointCandidate):
                refusal = await _refused(stream)
        except StreamError as error:
            if error.transport:
                router.failed(candidate.key, self._loop.time())
                ok = False
            router.ended(candidate.key, ok)
            # It may have broken off in the middle of an error's words.
            await opening.cancel()
            raise self._judged(error) from None
        except BaseException:
            # Counted first: what follows may be cancelled once more.
            router.ended(candidate.key, None)
            await opening.cancel()
            raise
        finally:
            opening.leave_queue()
        if isinstance(stream, EndpointCandidate):
            router.ended(candidate.key, None)
            return stream
        router.began(candidate.key, self._loop.time() - began)
        if refusal is not None:
            await stream.close()
            router.ended(candidate.key, is_callers_fault(refusal))
            # One that crashes as it loads does so over the model.
            if candidate.endpoint.loaded and runner_crashed(refusal.message):
                self.deaths.add_crash(refusal.message)
                self.deaths.check()
            raise _classified(refusal, candidate.engine)
        return Attempt(choice, stream, call)

    async def _request(self, candidate: EndpointCandidate, call: Call, bypass_queue: bool) -> EngineRequest:
        ask, body = self._ask, msgspec.json.encode(body_for(candidate, call))
        if ask.media is not None:
            body = await ask.media.put_back(body)
        now = self._loop.time()
        left = max(self.came + ask.deadline - now, 0.001) if ask.deadline > 0 else 0.0
        self._sent += 1
        return EngineRequest(
            # A request that comes back to an endpoint may meet its own former self, not yet gone.
            id=ask.id if self._sent == 1 else f"{ask.id}.{self._sent}",
            endpoint=candidate.endpoint.id,
            path=call.path,
            body=body,
            stream=ask.stream,
            priority=ask.priority,
            client=ask.client,
            age=now - self.came,
            deadline=left,
            keep_alive=ask.keep_alive,
            bypass_queue=bypass_queue or call.path in BYPASS_PATHS,
            trace=tracing.traceparent(),
        )

    async def _opened(self, opening: StreamOpening, query: EndpointQuery) -> Stream | EndpointCandidate:
        """The stream; or an endpoint that is free while the request waits in the queue, claimed already.

        Raises:
            StreamError: the endpoint failed.
        """
        router, view = self._context.router, self._context.view
        if opening.immediate:
            return await opening.open()
        began, key = self._loop.time(), opening.candidate.key
        while not await opening.wait(_RETHINK):
            if opening.request.bypass_queue and self._loop.time() - began > BYPASS_LIMIT:
                await opening.cancel()
                raise StreamError(ErrorKind.DEADLINE, "the engine does not answer a small request")
            if not opening.queued:
                continue
            better = router.better(view.live(), query, self._loop.time(), key)
            if better is not None:
                # Claimed before anything is awaited: the others in the queue look for it too.
                router.sent(better.key, query, self._loop.time())
                try:
                    await opening.cancel()
                except BaseException:
                    router.ended(better.key, None)
                    raise
                return better
        return opening.stream()

    def _judged(self, error: StreamError) -> Exception:
        """What a stream that could not be opened means for the request."""
        if error.kind is ErrorKind.FULL:
            retry_after = max(1.0, error.retry_after)
            return EndpointRefusal(Fault.UNAVAILABLE, error.message, retry_after=retry_after)
        if error.kind is ErrorKind.DEADLINE:
            return Refusal(Fault.TIMEOUT, error.message)
        log.info("an endpoint did not answer: %s", error, extra=self._extra)
        return error

    def _too_long(self, limit: float, why: str) -> Refusal:
        message = f"model {self._query.model!r} did not answer within {limit:.0f} s: {why}; try again later"
        return Refusal(Fault.UNAVAILABLE, message, retry_after=10.0)

    async def release(self, attempt: Attempt, ok: bool | None) -> None:
        """Done with ``attempt``. ``ok`` None: nothing is learned of the endpoint from it."""
        self._context.router.ended(attempt.candidate.key, ok)
        await attempt.stream.close()

    async def release_failed(self, attempt: Attempt, error: StreamError) -> None:
        """Done with ``attempt``, which failed."""
        self.deaths.add(attempt.candidate.key, error)
        if error.transport:
            self._context.router.failed(attempt.candidate.key, self._loop.time())
        await self.release(attempt, False if error.transport else None)


async def _refused(stream: Stream) -> Refusal | None:
    """The engine's own error, when its status is one.

    Raises:
        StreamError: it broke off.
    """
    status = stream.head.status if stream.head is not None else 0
    if status < 400:
        return None
    return engine_refusal(status, await whole(stream, limit=1024 * 1024))


def _classified(refusal: Refusal, engine: Engine) -> Exception:
    """What an engine's error means: the request's own, or another endpoint may answer."""
    if refusal.status == 503:
        return StreamError(ErrorKind.MOVED, refusal.message)
    # An Ollama may lack the memory, or the model by now, where another does not.
    if engine is Engine.OLLAMA and (refusal.status >= 500 or refusal.status == 404):
        return EndpointRefusal(refusal.fault, refusal.message, status=refusal.status)
    return refusal
