"""Finding an engine that begins to answer: an endpoint is chosen, or loaded, until an attempt succeeds."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace

from sollold import tracing
from sollold.cluster.net.view import next_change
from sollold.errors import Fault, Refusal
from sollold.facts import dataclass
from sollold.serving.attempts import BYPASS_PATHS, Attempt, Attempts, EndpointRefusal
from sollold.serving.candidate import EndpointCandidate, EndpointQuery, ScoredCandidate
from sollold.serving.context_size import LEAST_ANSWER_TOKENS, larger_context, too_long
from sollold.serving.loader import Need, Ready, ensure_of, with_ready
from sollold.serving.opening import ServingContext
from sollold.serving.protocol import StreamError
from sollold.serving.request import Ask, Call, Engine, Waiting

log = logging.getLogger("sollold.serving")

_AGAIN = 0.3
"""Seconds before endpoints that failed just now are asked again."""
_MEMORY_SECONDS = 20.0
"""After an engine was lost, so long memory that lacks for another may take to come back: what took it may be
a program that is at its peak just now, and ends or is ended by the system like the engine."""
_MEMORY_LOOK = 1.0


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
        lost: an engine that had the request was lost.
        short_since: when memory first lacked for another one; 0.0: it did not.
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
    """Finds engines for one request, at first and after each fault."""

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
        """No engine has the request, and none is there that it could be sent to."""
        self._progressed = 0.0
        """When a load that is waited for after a fault last went forward, and how far it was then."""
        self._furthest = 0.0
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
            answer = await self.attempts.begin(choice, call, search.query, search.stage)
        except StreamError as error:
            search.tried.add(candidate.key)
            search.lost = True
            if call.path not in BYPASS_PATHS:
                self.attempts.deaths.add(candidate.key, error)
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

    def _waits_for_memory(self, search: _Search, refusal: Refusal) -> bool:
        """Whether the model fitted a moment ago: the memory that lacks now may soon be there again."""
        if refusal.fault is not Fault.TOO_BIG or not search.lost or search.too_long is not None:
            return False
        now = self._loop.time()
        if not search.short_since:
            search.short_since = now
            log.warning(
                "no memory to load %s again, waiting up to %g s for it: %s",
                search.query.model, _MEMORY_SECONDS, refusal.message, extra=self._extra,
            )  # fmt: skip
        if now - search.short_since >= _MEMORY_SECONDS or now + _MEMORY_LOOK - search.began > search.limit:
            return False
        self._on_wait(Waiting(search.stage or "planning", message=refusal.message))
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
            if self._waits_for_memory(search, refusal):
                await next_change(view, _MEMORY_LOOK)
                return
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

    def _too_long(self, limit: float, why: str) -> Refusal:
        message = f"model {self._query.model!r} did not answer within {limit:.0f} s: {why}; try again later"
        return Refusal(Fault.UNAVAILABLE, message, retry_after=10.0)
