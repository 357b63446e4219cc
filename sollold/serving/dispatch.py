"""Finds an engine for a request: chooses an endpoint, or has one loaded, until an attempt succeeds."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgspec
from msgspec.structs import replace

from sollold import tracing
from sollold.cluster.net.view import next_change
from sollold.errors import Fault, Refusal
from sollold.serving.attempts import BYPASS_PATHS, Attempt, Attempts, EndpointRefusal
from sollold.serving.candidate import EndpointCandidate, EndpointQuery, ScoredCandidate
from sollold.serving.context_size import LEAST_ANSWER_TOKENS, larger_context, too_long
from sollold.serving.loader import Need, Ready, ensure_of, with_ready
from sollold.serving.opening import ServingContext
from sollold.serving.protocol import StreamError
from sollold.serving.request import Ask, Call, Engine, Waiting

log = logging.getLogger("sollold.serving")

_RETRY_SECONDS = 0.3
"""Pause before endpoints that have just failed are tried again, in seconds, unless the records change."""
_MIN_PART = 1 / 6
"""Minimum of such a pause if the records change, as a part of it."""
_MEMORY_SECONDS = 20.0
"""Maximum wait for memory to reload the model after an engine was lost, in seconds: a program that uses it
may be at its peak, and end soon or be killed by the system like the engine."""
_MEMORY_CHECK = 1.0
"""Interval between attempts to load the model during that wait, in seconds."""


class _Search(msgspec.Struct):
    """The state of one search for an engine, over all its attempts.

    Attributes:
        limit: maximum time to wait, in seconds from ``began``.
        stage: `Waiting.stage` to report for an answer already in progress; empty: the actual stage.
        tried: endpoints that failed; tried again only if there is no other.
        preferred: an endpoint that became free while the request waited elsewhere.
        ready: the endpoint named by the leader; its record may not have arrived here yet.
        loaded: the leader has just been asked.
        refusal: the refusal of an endpoint; raised if no other accepts the request.
        full: why the last queue refused the request.
        too_long: the refusal of the prompt as too long, while searching for an endpoint with more context.
        lost: an endpoint failed with the request.
        short_since: when memory for loading the model again was first short; 0.0: never.
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
    lost: bool = False
    short_since: float = 0.0


class Dispatcher:
    """Finds engines for one request, initially and after each fault."""

    def __init__(
        self,
        ask: Ask,
        query: EndpointQuery,
        on_wait: Callable[[Waiting], None],
        context: ServingContext,
        attempts: Attempts,
    ) -> None:
        self._ask = ask
        self._query = query
        self._on_wait = on_wait
        self._context = context
        self.attempts = attempts
        self._loop = asyncio.get_running_loop()
        self.load_ms = 0.0
        self.waiting = False
        """Whether no engine has the request and there is no endpoint that it could be sent to."""
        self._progressed = 0.0
        """When the load awaited after a fault last made progress."""
        self._furthest = 0.0
        """The furthest progress of that load."""
        self._extra = {"request": ask.id}

    async def find(
        self,
        calls: dict[Engine, Call],
        limit: float,
        stage: str = "",
        without: frozenset[tuple[str, str]] = frozenset(),
    ) -> Attempt:
        """Return an attempt that has begun to answer.

        ``stage``: `Waiting.stage` to report instead of the actual one, for an answer already in progress;
        ``without``: endpoints that have just failed, tried only if there is no other.

        Raises:
            Refusal: as its fault says.
        """
        query, engines = self._query, frozenset(calls)
        if query.engines != engines:
            query = replace(query, engines=engines)
        search = _Search(query, calls, limit, self._loop.time(), stage, set(without), lost=bool(without))
        self._furthest = 0.0
        while True:
            self.attempts.deaths.check()
            choice = self._best(search)
            if choice is None:
                self.waiting = True
                try:
                    await self._get_endpoint(search)
                finally:
                    self.waiting = False
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
        ranked = self._context.router.rank(
            records, search.query, now, search.tried, score_sole=self._ask.explain
        )
        preferred, search.preferred = search.preferred, ("", "")
        for choice in ranked:
            if choice.candidate.key == preferred:
                return choice
        if self.attempts.deaths.suspect:
            # All suspects of a crash go to the same endpoint, whichever nodes they come from: at most one
            # more engine can crash, and the last one may turn out to be the cause without another crash.
            return min(ranked, key=lambda choice: choice.candidate.key, default=None)
        return ranked[0] if ranked else None

    async def _try(self, choice: ScoredCandidate, search: _Search) -> Attempt | None:
        """Send the request to an endpoint. Return the attempt, or None if another one should be tried."""
        candidate = choice.candidate
        call = search.calls[candidate.engine]
        try:
            answer = await self.attempts.begin(choice, call, search.query, search.stage)
        except StreamError as error:
            search.tried.add(candidate.key)
            search.lost = True
            # Of small requests only the caller's own can be the cause, and only of a crash.
            own = call is self._ask.calls.get(candidate.engine)
            if call.path not in BYPASS_PATHS or (own and (error.crashed or error.suspect)):
                self.attempts.deaths.add(candidate.key, error)
        except EndpointRefusal as refusal:
            search.tried.add(candidate.key)
            # A full queue does not end an answer already in progress: it tries again until the limit.
            if search.stage and refusal.fault is Fault.UNAVAILABLE:
                search.full = refusal.message.removesuffix("; try again later")
            else:
                search.refusal = refusal
        except Refusal as refusal:
            if not self._raise_context(search, candidate, refusal):
                raise
        else:
            if isinstance(answer, Attempt):
                return answer
            search.preferred = answer.key
        return None

    def _raise_context(self, search: _Search, candidate: EndpointCandidate, refusal: Refusal) -> bool:
        """If the prompt is too long for the endpoint, start looking for one with more context.

        Return whether it was. Never exceeds a context that the caller has set.

        Raises:
            Refusal: the prompt is too long even with more context.
        """
        query = search.query
        if search.too_long is not None:
            raise too_long(refusal, "more context does not fit")
        if query.context or query.embedding or candidate.engine is not Engine.LLAMA:
            return False
        needed = larger_context(refusal, search.calls[Engine.LLAMA].body, query.trained)
        if needed <= candidate.endpoint.context:
            return False
        log.info("%s: requesting a context of %d tokens", refusal, needed, extra=self._extra)
        search.query = replace(query, context=needed, engines=frozenset((Engine.LLAMA,)), assigned=("", ""))
        search.too_long, search.loaded = refusal, False
        return True

    def _lower_context(self, search: _Search, refusal: Refusal) -> bool:
        """If possible, search again with less context for the answer, since the desired one does not fit."""
        query, body = search.query, search.calls[Engine.LLAMA].body
        context = larger_context(refusal, body, query.trained, LEAST_ANSWER_TOKENS)
        if context >= query.context:
            return False
        search.query, search.loaded = replace(query, context=context, assigned=("", "")), False
        return True

    def _may_wait_for_memory(self, search: _Search, refusal: Refusal) -> bool:
        """Whether to wait for memory: the model fitted a moment ago, so the shortage may be temporary."""
        if refusal.fault is not Fault.TOO_BIG or not search.lost or search.too_long is not None:
            return False
        now = self._loop.time()
        if not search.short_since:
            search.short_since = now
            log.warning(
                "no memory to load %s again, waiting up to %g s: %s",
                search.query.model, _MEMORY_SECONDS, refusal.message, extra=self._extra,
            )  # fmt: skip
        if now - search.short_since >= _MEMORY_SECONDS or now + _MEMORY_CHECK - search.began > search.limit:
            return False
        self._on_wait(Waiting(search.stage or "planning", message=refusal.message))
        return True

    async def _get_endpoint(self, search: _Search) -> None:
        """When there is no endpoint to try: have one loaded, or wait until failed ones may be tried again.

        Raises:
            Refusal: as its fault says.
        """
        if search.refusal is not None:
            await self._load_in_llama(search, search.refusal)
            return
        search.began = max(search.began, self._progressed)
        if self._loop.time() - search.began > search.limit:
            raise self._too_long(search.limit, search.full or "it could not be reached")
        search.ready = None
        if search.tried:
            # The record still reports an unresponsive endpoint as READY: give its node time to notice.
            await self._pause(_RETRY_SECONDS)
            search.tried.clear()
            return
        if search.loaded:
            # The leader named an endpoint that is READY, but this node does not know or reach it yet.
            await self._pause(_RETRY_SECONDS)
        try:
            search.ready = ready = await self._load(search)
        except Refusal as refusal:
            if self._may_wait_for_memory(search, refusal):
                await self._pause(_MEMORY_CHECK)
                return
            if search.too_long is None or refusal.fault is not Fault.TOO_BIG:
                raise
            if self._lower_context(search, search.too_long):
                return
            raise too_long(search.too_long, refusal.message) from None
        search.loaded = True
        if ready is None:
            return
        search.query = replace(search.query, assigned=(ready.node, ready.endpoint.id))
        context = ready.endpoint.context
        if 0 < context < max(search.query.context, search.query.usual):
            if search.too_long is not None and context < search.query.context:
                if self._lower_context(search, search.too_long):
                    return
                raise too_long(search.too_long, "; ".join(ready.reasons) or "more context does not fit")
            # More was wanted than was trained or than fits: accept what the leader gives.
            search.query = replace(
                search.query,
                context=min(context, search.query.context),
                usual=min(context, search.query.usual),
            )

    async def _pause(self, seconds: float) -> None:
        """Wait for a change of the records, at most ``seconds`` and at least `_MIN_PART` of it.

        In a big cluster the records change all the time, and each attempt costs a connection or a plan.
        """
        began = self._loop.time()
        await next_change(self._context.view, seconds)
        await asyncio.sleep(max(0.0, began + _MIN_PART * seconds - self._loop.time()))

    async def _load_in_llama(self, search: _Search, refusal: Refusal) -> None:
        """After a failure of the Ollama that has the model, ask the leader to load it with llama.cpp.

        Raises:
            Refusal: that failed too, or the refusal was not a failure of Ollama.
        """
        engine_failed = refusal.fault is Fault.ENGINE and (refusal.status >= 500 or refusal.status == 404)
        if not engine_failed or search.query.engines != frozenset((Engine.LLAMA, Engine.OLLAMA)):
            raise refusal
        search.query = replace(search.query, engines=frozenset((Engine.LLAMA,)), assigned=("", ""))
        search.refusal = None
        log.info("an Ollama refused, asking the leader: %s", refusal, extra=self._extra)
        try:
            search.ready = await self._load(search)
        except Refusal as failure:
            # Why the model does not fit says more than Ollama's error; other errors do not.
            raise failure if failure.fault is Fault.TOO_BIG else refusal from None
        search.loaded = True

    async def _load(self, search: _Search) -> Ready | None:
        began, stage = self._loop.time(), search.stage
        # An interrupted stream waits for as long as its model's load makes progress.
        waited = began - search.began
        remaining = max(0.0, search.limit - waited)
        ensure = ensure_of(search.query, self._ask.keep_alive)
        need = Need(ensure, remaining, begun=bool(stage), waited=waited)
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

    def _too_long(self, limit: float, cause: str) -> Refusal:
        message = f"model {self._query.model!r} did not answer within {limit:.0f} s: {cause}; try again later"
        return Refusal(Fault.UNAVAILABLE, message, retry_after=10.0)
