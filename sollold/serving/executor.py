"""Executes one request at the node that received it: from the choice of its endpoint to its last event."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from msgspec.structs import replace

from sollold import tracing
from sollold.cluster.gossip.record import Backend
from sollold.cluster.net.pour import Receiver
from sollold.errors import Fault, Refusal, unloaded_by_force
from sollold.serving.attempts import BYPASS_LIMIT, BYPASS_PATHS, Attempt, Attempts
from sollold.serving.candidate import EndpointQuery
from sollold.serving.dispatch import Dispatcher
from sollold.serving.engine_error import (
    engine_refusal,
    is_callers_fault,
    is_unparsed,
    runner_crashed,
    stream_status,
)
from sollold.serving.event_reader import EventReader, callers_name
from sollold.serving.opening import ServingContext
from sollold.serving.prompt_cut import CutPrompt
from sollold.serving.protocol import ErrorKind, StreamError
from sollold.serving.recovery import engine_for_rest, find_rest, must_restart, restored
from sollold.serving.request import Answer, Ask, Delivered, Engine, Routing, Waiting
from sollold.serving.resume.base import Continuation
from sollold.serving.resume.select import continuation_for
from sollold.serving.stoppable_search import StoppableSearch
from sollold.serving.stream import whole
from sollold.serving.unload import TOUCH, read_and_discard, unload
from sollold.units import seconds_text

log = logging.getLogger("sollold.serving")

_MAX_RESUMES = 20
"""Maximum faults one response may survive; beyond that, something else is wrong."""
_MAX_ENGINE_ERRORS = 2
"""Errors reported by engines in one response before the next one is attributed to the request itself."""
_PARTIAL_CALL = (
    "the model's tool call can't be parsed, and a part of it was already sent; send the request again"
)


class RequestExecutor:
    """Executes one request. Call one of `open`, `load` and `unload` once, and always `close`."""

    def __init__(
        self,
        ask: Ask,
        query: EndpointQuery,
        on_wait: Callable[[Waiting], None],
        context: ServingContext,
        on_end: Callable[[RequestExecutor], None],
    ) -> None:
        self._ask = ask
        self._query = query
        self._on_wait = on_wait
        self._context = context
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._attempts = Attempts(ask, on_wait, context)
        self._dispatcher = Dispatcher(ask, query, on_wait, context, self._attempts)
        self._attempt: Attempt | None = None
        self._continuation: Continuation | None = None
        """The delivered part of a streamed answer."""
        self._reader: EventReader | None = None
        """Parses the current attempt's body; None between attempts."""
        self._routing: Routing | None = None
        self._cut: CutPrompt | None = None
        """Detects whether an Ollama has cut the prompt."""
        self._search = StoppableSearch(self._attempts.release)
        self._over = False
        self._deadline: asyncio.TimerHandle | None = None
        self._fault_at = 0.0
        self._engine_errors = 0
        self._extra = {"request": ask.id}

    @property
    def node(self) -> str:
        """The node of the answering endpoint; empty if none is answering."""
        return self._attempt.candidate.record.node if self._attempt is not None else ""

    @property
    def model(self) -> str:
        """The model's name in the library."""
        return self._query.model

    @property
    def waiting(self) -> bool:
        """Whether the request waits for an endpoint that it could be sent to."""
        return self._dispatcher.waiting

    @property
    def resumed(self) -> int:
        """Number of faults after which the answer continued."""
        return self._routing.resumed if self._routing is not None else 0

    async def open(self) -> Answer:
        """Find or load an endpoint and begin the answer.

        Raises:
            Refusal: as its fault says.
        """
        delivered, run = self._ask.delivered, self._search.run
        if delivered is not None:
            attempt = await run(self._take_over(delivered))
        else:
            attempt = await run(self._dispatcher.find(self._ask.calls, self._context.http.wait_limit))
        self._attempt = attempt
        if attempt is None:
            me = self._context.view.me
            self._routing = Routing(Backend.OLLAMA, Engine.OLLAMA, self._query.model, me.name, "")
            return Answer(self._routing, self._pour_end, self.close, self.over)
        self._routing = self._attempts.routing(attempt, self._query, self._dispatcher.load_ms)
        if self._ask.deadline > 0:
            remaining = self._attempts.came + self._ask.deadline - self._loop.time()
            self._deadline = self._loop.call_later(max(0.0, remaining), self._expire)
        if attempt.candidate.engine is Engine.OLLAMA and not self._ask.embedding:
            context = partial(self._attempts.context_of, attempt, self._query)
            self._cut = CutPrompt(self._routing, attempt.call.body, context)
        pour = self._pour if self._ask.stream else self._pour_whole
        return Answer(self._routing, pour, self.close, self.over)

    async def _take_over(self, delivered: Delivered) -> Attempt | None:
        """Find an engine for the rest of an answer that another node began; None if only its end is missing.

        Raises:
            Refusal: as its fault says; INTERRUPTED if the answer can't be continued exactly.
        """
        records = self._context.view.live()
        candidates = self._context.router.candidates(records, self._query, self._loop.time())
        engine = engine_for_rest(delivered, self._ask.calls, {candidate.engine for candidate in candidates})
        continuation = self._continuation = restored(delivered, engine, self._ask.calls[engine])
        log.info("resuming a stream that another node began", extra=self._extra)
        limit = self._context.serving.recover_limit
        return await find_rest(self._dispatcher, self._ask, limit, engine, frozenset(), continuation)

    async def load(self) -> Answer:
        """Only have the model loaded.

        Raises:
            Refusal: as its fault says.
        """
        touch = {e: TOUCH if e is Engine.LLAMA else call for e, call in self._ask.calls.items()}
        find, limit = self._dispatcher.find, self._context.http.wait_limit
        attempt = self._attempt = await self._search.run(find(touch, limit))
        try:
            # An Ollama may take any time to load a model.
            await read_and_discard(attempt, BYPASS_LIMIT if attempt.call.path in BYPASS_PATHS else None)
        except Refusal as refusal:
            raise self._search.stopped or refusal from None
        self._routing = self._attempts.routing(attempt, self._query, self._dispatcher.load_ms)
        return Answer(self._routing, self._pour_end, self.close, self.over)

    async def unload(self) -> Answer:
        """End the model's deployments that are not in use, and have Ollama unload it.

        Raises:
            Refusal: as its fault says.
        """
        self._routing = await unload(self._ask, self._query, self._context, self._attempts)
        return Answer(self._routing, self._pour_end, self.close, self.over)

    async def close(self) -> None:
        """End the generation unless finished, and free its slot. May be called twice."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._search.cancel()
        attempt, self._attempt = self._attempt, None
        self._on_end(self)
        if attempt is not None:
            await self._attempts.release(attempt, None)
        self._over = True

    def over(self) -> bool:
        """Whether everything is closed."""
        return self._over and self._attempt is None

    def node_lost(self, reason: str) -> None:
        """Abort the current attempt: its endpoint's node is gone."""
        if self._attempt is not None:
            self._attempt.stream.abort(StreamError(ErrorKind.ENGINE, reason))

    def stop(self, reason: str) -> None:
        """End the answer, or the wait for one, with a clear error, since this node is stopping."""
        if self._routing is None:
            self._halt(Refusal(Fault.UNAVAILABLE, f"{reason}; use another node", retry_after=1.0))
            return
        self._halt(Refusal(Fault.INTERRUPTED, f"the answer was interrupted: {reason}"))

    def _expire(self) -> None:
        seconds = seconds_text(self._ask.deadline)
        self._halt(
            Refusal(
                Fault.TIMEOUT, f"the response was not complete within the request's deadline of {seconds}"
            )
        )

    def _halt(self, refusal: Refusal) -> None:
        self._search.stop(refusal)
        if self._attempt is not None:
            self._attempt.stream.abort(StreamError(ErrorKind.DEADLINE, refusal.message))

    # Delivering the answer.

    async def _pour_end(self, receive: Receiver[list[bytes]]) -> bool:
        """Deliver the end of an answer that needs no (further) engine."""
        if self._continuation is not None:
            receive(self._continuation.closing())
        await self.close()
        return True

    def _check_stopped(self) -> None:
        """Raise the error of an answer that was stopped and closed before its caller had read all of it."""
        if self._attempt is None:
            self._search.check()

    async def _pour_whole(self, receive: Receiver[list[bytes]]) -> bool:
        """Deliver a response that is not streamed, as one event. After a fault the request is repeated."""
        self._check_stopped()
        attempt = self._attempt
        while attempt is not None:
            try:
                body = await whole(attempt.stream)
                self._first_event()
            except StreamError as error:
                attempt = await self._recover(error, attempt)
                continue
            if self._cut is not None:
                self._cut.look([body])
            if rename := callers_name(attempt):
                body = rename(body)
            await self._done(attempt)
            receive([body])
            break
        await self.close()
        return True

    async def _pour(self, receive: Receiver[list[bytes]]) -> bool:
        """Deliver the events of a stream, across all faults, as described in `sollold.cluster.net.pour`."""
        self._check_stopped()
        while self._attempt is not None:
            if self._continuation is None:
                self._continuation = continuation_for(self._attempt.candidate.engine, self._attempt.call)
            if not await self._pour_from(self._attempt, self._continuation, receive):
                return False
        await self.close()
        return True

    async def _pour_from(
        self, attempt: Attempt, continuation: Continuation, receive: Receiver[list[bytes]]
    ) -> bool:
        """Deliver one attempt's events, in lists of those that arrived together.

        Return False if the receiver wants no more for now. After True, `_attempt` is the attempt that
        continues the answer, or None if the answer is complete.
        """
        reader = self._reader = self._reader or EventReader(attempt, continuation)

        def read(chunk: bytes) -> bool:
            events = reader.feed(chunk)
            if not reader.began and reader.started:
                reader.began = self._first_event()
            if self._cut is not None:
                self._cut.look(events)
            # An error ends the reading, once the receiver has the events before it.
            return (not events or receive(events)) and not reader.error

        try:
            if reader.error:
                raise self._engine_error(reader, attempt)
            if not await attempt.stream.pour(read):
                return False
            events = reader.finish()
            if self._cut is not None:
                self._cut.look(events)
            if events and not receive(events):
                return False
            if reader.error:
                raise self._engine_error(reader, attempt)
            if not reader.whole and (events := self._cut_short(attempt, continuation)):
                receive(events)
            await self._done(attempt)
        except StreamError as error:
            if reader.over:
                await self._done(attempt)
                return True
            if reader.began:
                continuation.spent_ms += (self._loop.time() - reader.began) * 1000
            if reader.delivered:
                self._attempts.deaths.delivered()
            await self._recover(error, attempt, continuation)
            self._reader = None
            if self._attempt is None and (events := continuation.closing()):
                receive(events)
            elif self._continuation is not continuation:
                # An empty event: discard everything from before the fault.
                receive([b""])
        return True

    def _cut_short(self, attempt: Attempt, continuation: Continuation) -> list[bytes]:
        """Return the last events for a body that is complete, but without the engine's end marker.

        Raises:
            StreamError: it is a fault of the engine (always, except for Ollama).
        """
        if attempt.candidate.engine is not Engine.OLLAMA:
            raise StreamError(ErrorKind.ENGINE, "the engine ended its answer early", transport=True)
        # It would do so again wherever it is resumed.
        log.info("an Ollama ended its answer early; it may have repeated itself", extra=self._extra)
        return continuation.cut_short()

    async def _done(self, attempt: Attempt) -> None:
        self._attempt = None
        await self._attempts.release(attempt, True)

    def _first_event(self) -> float:
        """Note the first event of an attempt, which ends the gap after a fault. Return the time."""
        now = self._loop.time()
        if self._fault_at and self._routing is not None:
            self._routing.gap_ms += (now - self._fault_at) * 1000
            self._fault_at = 0.0
        return now

    def _engine_error(self, reader: EventReader, attempt: Attempt) -> Exception:
        """Return the exception for an error in the stream: a fault to recover from, or the caller's error."""
        refusal = engine_refusal(stream_status(reader.error), reader.error)
        unparsed = self._continuation if is_unparsed(refusal.message) else None
        if unparsed is not None and unparsed.has_tool_call and not self._ask.gathered:
            return Refusal(Fault.ENGINE, _PARTIAL_CALL, status=500)
        self._engine_errors += 1
        if is_callers_fault(refusal) or self._engine_errors > _MAX_ENGINE_ERRORS:
            return refusal
        if unparsed is not None:
            unparsed.forbid_tool_calls()
        crashed = not reader.delivered and runner_crashed(refusal.message)
        cause = crashed and self._attempts.is_cause(attempt.stream)
        message = f"the engine failed: {refusal.message}"
        return StreamError(ErrorKind.ENGINE, message, crashed=cause, suspect=crashed and not cause)

    # After a fault.

    async def _recover(
        self, error: StreamError, attempt: Attempt, continuation: Continuation | None = None
    ) -> Attempt | None:
        """Find an engine that continues the answer where it stopped; None if only its end is missing.

        Raises:
            Refusal: the answer can't continue.
        """
        routing = self._routing
        assert routing is not None
        self._fault_at = self._fault_at or self._loop.time()
        self._attempt = None
        await self._attempts.release_failed(attempt, error)
        self._search.check()
        if error.forced:
            raise unloaded_by_force(self._ask.model)
        if routing.resumed >= _MAX_RESUMES:
            raise Refusal(
                Fault.INTERRUPTED, f"the response was interrupted {_MAX_RESUMES} times, last: {error}"
            )
        restart = must_restart(error, continuation, gathered=self._ask.gathered)
        log.warning("stream interrupted, resuming on another endpoint: %s", error, extra=self._extra)
        tracing.current().event("interrupted", {"error": str(error), "node": routing.node})
        self._on_wait(Waiting("recovering", message=str(error)))
        limit = self._context.serving.recover_limit
        rest = None if restart else continuation
        try:
            failed = attempt.candidate
            without = frozenset(() if is_unparsed(error.message) else (failed.key,))
            ask = self._ask
            if restart and continuation is not None and is_unparsed(error.message):
                # The same request would end in the same way.
                ask = replace(ask, calls={failed.engine: continuation.call})
            search = find_rest(self._dispatcher, ask, limit, failed.engine, without, rest)
            new = await self._search.run(search)
        except Refusal as refusal:
            if refusal.fault in (Fault.TIMEOUT, Fault.BAD_REQUEST) or refusal is self._search.stopped:
                raise
            raise Refusal(
                Fault.INTERRUPTED,
                f"the answer was interrupted ({error}) and could not be continued: {refusal.message}",
                retry_after=refusal.retry_after,
            ) from None
        routing.resumed += 1
        self._attempt = new
        if new is None:
            return None
        if restart:
            self._continuation = continuation_for(new.candidate.engine, new.call)
        routing.move(self._attempts.routing(new, self._query, self._dispatcher.load_ms))
        return new
