"""One request at the node asked, from its endpoint's choice to its last event, over all faults."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

import msgspec

from sollold.cluster.record import Backend, Endpoint, State
from sollold.serving.ask import Answer, Ask, Call, Engine, Fault, Refusal, Routing, Waiting
from sollold.serving.finding import ASIDE, ASIDE_LIMIT, Finder, Leg, Means, message_in
from sollold.serving.origin import routing_of
from sollold.serving.relay import Events, whole
from sollold.serving.resume import keeper
from sollold.serving.resume_state import Kept, Unfaithful
from sollold.serving.router import Choice, Wish
from sollold.serving.visit import Failure
from sollold.serving.wire import Break, Broken

log = logging.getLogger("sollold.serving")

_Found = TypeVar("_Found", Leg, Leg | None)

_ERROR = b'{"error"'
_RESUMES = 20
"""Faults that one answer survives; more are a fault of another kind."""
_ENGINE_ERRORS = 2
"""Errors that engines themselves report in one stream before they are believed to be the request's own."""
_TOUCH = Call("/tokenize", {"content": ""})
"""The smallest question that a llama-server answers: with it an endpoint learns of keep_alive."""


class Errand:
    """See the module. `open`, `load` or `unload` is called once; `close` always."""

    def __init__(
        self,
        ask: Ask,
        wish: Wish,
        on_wait: Callable[[Waiting], None],
        means: Means,
        on_end: Callable[[Errand], None],
    ) -> None:
        self._ask = ask
        self._wish = wish
        self._on_wait = on_wait
        self._means = means
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._finder = Finder(ask, wish, on_wait, means)
        self._leg: Leg | None = None
        self._routing: Routing | None = None
        self._stopped: Refusal | None = None
        self._finding: asyncio.Future[Any] | None = None
        """While an engine is looked for, at first or after a fault."""
        self._deadline: asyncio.TimerHandle | None = None
        self._fault_at = 0.0
        self._anew = False
        """What was given before the last fault is to be forgotten."""
        self._engine_errors = 0
        self._extra = {"request": ask.id}

    @property
    def node(self) -> str:
        """The endpoint's node, while one answers; empty else."""
        return self._leg.candidate.record.node if self._leg is not None else ""

    async def open(self) -> Answer:
        """Begin the answer.

        Raises:
            Refusal: as its fault says.
        """
        find, limit = self._finder.find, self._means.http.wait_limit
        leg = self._leg = await self._found(find(self._ask.calls, limit))
        self._routing = self._routing_from(leg)
        if self._ask.deadline > 0:
            left = self._finder.came + self._ask.deadline - self._loop.time()
            self._deadline = self._loop.call_later(max(0.0, left), self._expire)
        events = self._stream() if self._ask.stream else self._whole()
        return Answer(self._routing, events, self.close)

    async def load(self) -> Answer:
        """Only get the model loaded.

        Raises:
            Refusal: as its fault says.
        """
        touch = {e: _TOUCH if e is Engine.LLAMA else call for e, call in self._ask.calls.items()}
        find, limit = self._finder.find, self._means.http.wait_limit
        leg = self._leg = await self._found(find(touch, limit))
        try:
            # To load a model an Ollama may take as long as it takes.
            await _read_away(leg, ASIDE_LIMIT if leg.call.path in ASIDE else None)
        except Refusal as refusal:
            raise self._stopped or refusal from None
        self._routing = self._routing_from(leg)
        return Answer(self._routing, self._nothing(), self.close)

    async def unload(self) -> Answer:
        """End the deployments of the model that are not in use, and let an Ollama unload it.

        Raises:
            Refusal: as its fault says.
        """
        view = self._means.view
        candidates = self._means.router.candidates(view.live(), self._wish, self._loop.time())
        if any(candidate.engine is Engine.LLAMA for candidate in candidates):
            await self._means.loader.drop(self._wish, "a caller asked for it (keep_alive 0)")
        # One that is in use ends when it is idle: it is told so by a question with keep_alive 0.
        there = view.live()
        refused: Refusal | None = None
        for candidate in self._means.router.candidates(there, self._wish, self._loop.time()):
            if not candidate.endpoint.loaded:
                continue
            call = _TOUCH if candidate.engine is Engine.LLAMA else self._ask.calls[Engine.OLLAMA]
            # Aside: in line behind others it would wait for what they ask, or be sent to another endpoint.
            leg = await self._finder.enter(Choice(candidate, 0.0, ""), call, self._wish, aside=True)
            if isinstance(leg, Leg):
                try:
                    await _read_away(leg, ASIDE_LIMIT)
                finally:
                    await self._finder.leave(leg, True)
            elif isinstance(leg, Refusal) and leg.status != 404:
                refused = leg
        if refused is not None:
            raise refused
        if candidates:
            record, endpoint = candidates[0].record, candidates[0].endpoint
        else:
            # Nothing was loaded, which is what was asked for.
            record = view.me
            endpoint = Endpoint("", self._wish.model, self._wish.digest, Backend.LOCAL, State.DRAINING)
        self._routing = routing_of(self._wish.model, record, endpoint, view.live())
        return Answer(self._routing, self._nothing(), self.close)

    async def close(self) -> None:
        """End the generation, if it is not at its end, and free its place. May be called twice."""
        if self._deadline is not None:
            self._deadline.cancel()
        if self._finding is not None:
            self._finding.cancel()
        leg, self._leg = self._leg, None
        self._on_end(self)
        if leg is not None:
            await self._finder.leave(leg, None)

    def lost(self, reason: str) -> None:
        """The endpoint's node is gone: wait for nothing more from it."""
        if self._leg is not None:
            self._leg.stream.end(Broken(Break.ENGINE, reason))

    def stop(self, reason: str) -> None:
        """This node stops: end the answer, or the wait for one, with a clear error."""
        if self._routing is None:
            self._halt(Refusal(Fault.UNAVAILABLE, f"{reason}; ask another", retry_after=1.0))
            return
        self._halt(Refusal(Fault.INTERRUPTED, f"the answer was broken off: {reason}"))

    def _expire(self) -> None:
        seconds = f"{self._ask.deadline:g} s"
        self._halt(
            Refusal(Fault.TIMEOUT, f"the answer was not whole within the {seconds} that the request allows")
        )

    def _halt(self, refusal: Refusal) -> None:
        self._stopped = refusal
        if self._leg is not None:
            self._leg.stream.end(Broken(Break.DEADLINE, refusal.message))
        elif self._finding is not None:
            self._finding.cancel()

    async def _found(self, find: Coroutine[Any, Any, _Found]) -> _Found:
        """What ``find`` finds, unless the answer is stopped meanwhile.

        Raises:
            Refusal: as its fault says.
        """
        self._finding = finding = asyncio.ensure_future(find)
        try:
            leg = await finding
        except asyncio.CancelledError:
            if self._stopped is not None and finding.cancelled():
                raise self._stopped from None
            if finding.done() and not finding.cancelled() and finding.exception() is None:
                # Found in the very moment in which the caller hung up.
                await self._leave(finding.result())
            raise
        finally:
            self._finding = None
        if self._stopped is not None:
            await self._leave(leg)
            raise self._stopped
        return leg

    async def _leave(self, leg: Leg | None) -> None:
        if leg is not None:
            await self._finder.leave(leg, None)

    # Giving the answer.

    async def _whole(self) -> AsyncIterator[bytes]:
        """A request that is not streamed: one event. Nothing was delivered, so a fault repeats it."""
        try:
            leg = self._leg
            while leg is not None:
                try:
                    body = await whole(leg.stream)
                    self._first_event()
                except Failure as failure:
                    leg = await self._mend(failure, leg, None)
                    continue
                renamed = leg.renamed
                yield renamed(body) if renamed else body
                await self._done(leg)
                return
        finally:
            await self.close()

    async def _stream(self) -> AsyncIterator[bytes]:
        """A streamed request: the engine's events, over all faults."""
        try:
            leg = self._leg
            if leg is None:
                return
            kept = keeper(leg.candidate.engine, leg.call)
            while True:
                began = 0.0
                moved = False
                cut = Events(leg.candidate.engine, leg.call.path)
                renamed = leg.renamed
                try:
                    async for chunk in leg.stream.chunks():
                        for event in cut.feed(chunk):
                            if event.startswith(_ERROR):
                                raise self._engine_error(event)
                            if renamed:
                                event = renamed(event)
                            if not began:
                                began = self._first_event()
                            if kept.resumed:
                                for merged in kept.merge(event):
                                    moved = True
                                    yield merged
                            else:
                                # Nearly every token goes this way: nothing is read, nothing is copied.
                                moved = True
                                kept.add(event)
                                yield event
                    for event in cut.finish():
                        if renamed:
                            event = renamed(event)
                        for merged in kept.take(event):
                            yield merged
                    if not cut.done:
                        why = "the engine ended its answer early"
                        raise Failure(Broken(Break.ENGINE, why, transport=True))
                except Failure as failure:
                    if cut.over:
                        await self._done(leg)
                        return
                    if began:
                        kept.spent_ms += (self._loop.time() - began) * 1000
                    if moved:
                        self._finder.delivered()
                    mended = await self._mend(failure, leg, kept)
                    if mended is None:
                        for event in kept.closing():
                            yield event
                        return
                    leg = mended
                    if self._anew:
                        self._anew = False
                        kept = keeper(leg.candidate.engine, leg.call)
                        yield b""
                else:
                    await self._done(leg)
                    return
        finally:
            await self.close()

    async def _nothing(self) -> AsyncIterator[bytes]:
        """The answer to a request that only loads or unloads."""
        await self.close()
        return
        yield b""

    async def _done(self, leg: Leg) -> None:
        self._leg = None
        await self._finder.leave(leg, True)

    def _first_event(self) -> float:
        """The first event of a leg came: after a fault the gap ends here. Returns the time."""
        now = self._loop.time()
        if self._fault_at and self._routing is not None:
            self._routing.gap_ms += (now - self._fault_at) * 1000
            self._fault_at = 0.0
        return now

    def _engine_error(self, event: bytes) -> Exception:
        """An error in the stream: a fault to be mended once or twice, or the request's own."""
        message = message_in(event) or "the engine failed"
        status = _status_in(event)
        self._engine_errors += 1
        if status < 500 or self._engine_errors > _ENGINE_ERRORS:
            return Refusal(Fault.ENGINE, message, status=status)
        return Failure(Broken(Break.ENGINE, f"the engine failed: {message}"))

    # After a fault.

    async def _mend(self, failure: Failure, leg: Leg, kept: Kept | None) -> Leg | None:
        """Another engine goes on where the answer stopped; None when nothing but its end is lacking.

        Raises:
            Refusal: it can't be mended.
        """
        routing = self._routing
        assert routing is not None
        self._fault_at = self._fault_at or self._loop.time()
        self._leg = None
        await self._finder.drop(leg, failure)
        if self._stopped is not None:
            raise self._stopped
        if routing.resumed >= _RESUMES:
            raise Refusal(
                Fault.INTERRUPTED, f"the answer was interrupted {_RESUMES} times; at last: {failure}"
            )
        if kept is not None and kept.delivered:
            try:
                kept.check()
            except Unfaithful as error:
                if not self._ask.gathered:
                    raise Refusal(
                        Fault.INTERRUPTED,
                        f"the answer was interrupted ({failure}) and can't be continued exactly: {error}. "
                        "Ask again",
                    ) from None
                self._anew = True
                kept = None
        log.warning("an answer broke off and goes on elsewhere: %s", failure, extra=self._extra)
        self._on_wait(Waiting("recovering", message=str(failure)))
        try:
            new = await self._found(self._again(leg, kept))
        except Refusal as refusal:
            if refusal.fault is Fault.TIMEOUT or refusal is self._stopped:
                raise
            raise Refusal(
                Fault.INTERRUPTED,
                f"the answer was interrupted ({failure}) and could not go on: {refusal.message}",
                retry_after=refusal.retry_after,
            ) from None
        routing.resumed += 1
        if new is None:
            return None
        self._leg = new
        moved = self._routing_from(new)
        routing.node, routing.backend, routing.engine = moved.node, moved.backend, moved.engine
        routing.coordinator_url, routing.devices = moved.coordinator_url, moved.devices
        return new

    async def _again(self, leg: Leg, kept: Kept | None) -> Leg | None:
        """Find an engine for the rest of the answer: of the same kind, so that its events have the same form.

        For an answer that is given whole any will do: nobody has seen anything of its form yet.
        """
        find, limit = self._finder.find, self._means.serving.recover_limit
        engine, failed = leg.candidate.engine, frozenset((leg.candidate.key,))
        if kept is None:
            return await find(self._ask.calls, limit, "recovering", failed)
        if not kept.delivered:
            return await find({engine: self._ask.calls[engine]}, limit, "recovering", failed)
        tokens: int | None = None
        if engine is Engine.LLAMA and kept.text:
            try:
                tokens = await self._count(kept, failed)
            except (Failure, TimeoutError, msgspec.MsgspecError) as error:
                log.info("the engine did not count tokens: %s", error, extra=self._extra)
            except Refusal as refusal:
                # An engine that is deaf to this is watched while it works on the answer itself.
                if refusal.fault not in (Fault.ENGINE, Fault.TIMEOUT):
                    raise
        call = kept.resume(tokens)
        if kept.closing():
            return None
        return await find({engine: call}, limit, "recovering", failed)

    async def _count(self, kept: Kept, failed: frozenset[tuple[str, str]]) -> int:
        """How many tokens were delivered, by the engine's own tokenizer.

        Raises:
            Failure, TimeoutError, msgspec.MsgspecError: it does not say.
        """
        pair = kept.measure()
        if pair is None:
            return await self._count_text(kept.text, False, failed)
        prompts = []
        for call in pair:
            answer = msgspec.json.decode(await self._ask_aside(call, failed), type=_Prompt)
            prompts.append(await self._count_text(answer.prompt, True, failed))
        return max(0, prompts[1] - prompts[0])

    async def _count_text(self, text: str, special: bool, failed: frozenset[tuple[str, str]]) -> int:
        call = Call("/tokenize", {"content": text, "add_special": special, "parse_special": True})
        return len(msgspec.json.decode(await self._ask_aside(call, failed), type=_Tokens).tokens)

    async def _ask_aside(self, call: Call, failed: frozenset[tuple[str, str]]) -> bytes:
        """A small question to an engine for this model; it needs no turn.

        Raises:
            Failure, TimeoutError: it broke off, or gave no answer.
        """
        limit = self._means.serving.recover_limit
        leg = await self._finder.find({Engine.LLAMA: call}, limit, "recovering", failed)
        try:
            async with asyncio.timeout(ASIDE_LIMIT):
                return await whole(leg.stream)
        finally:
            await self._finder.leave(leg, None)

    def _routing_from(self, leg: Leg) -> Routing:
        view = self._means.view
        routing = routing_of(self._wish.model, leg.candidate.record, leg.candidate.endpoint, view.live())
        routing.load_ms = self._finder.load_ms
        routing.queue_ms = leg.stream.begun.queue_ms
        if self._ask.explain:
            others = self._means.router.rank(
                view.live(), self._wish, self._loop.time(), frozenset((leg.candidate.key,))
            )
            routing.scores = tuple(
                ("/".join(choice.candidate.key), choice.score, choice.why) for choice in (leg.choice, *others)
            )
        return routing


class _Tokens(msgspec.Struct):
    """llama-server's answer to ``/tokenize``."""

    tokens: list[int | msgspec.Raw]


class _Prompt(msgspec.Struct):
    """llama-server's answer to ``/apply-template``."""

    prompt: str


class _ErrorCode(msgspec.Struct):
    code: int | str | None = None


class _ErrorEvent(msgspec.Struct):
    error: _ErrorCode | str = ""


def _status_in(event: bytes) -> int:
    """The status that an error in a stream would have had; 500 when it says none."""
    try:
        error = msgspec.json.decode(event, type=_ErrorEvent).error
    except msgspec.MsgspecError:
        return 500
    code = error.code if isinstance(error, _ErrorCode) else None
    return code if isinstance(code, int) and 400 <= code <= 599 else 500


async def _read_away(leg: Leg, limit: float | None) -> None:
    """Read the answer to its end, in ``limit`` seconds; None: in whatever time it takes."""
    try:
        async with asyncio.timeout(limit):
            await whole(leg.stream)
    except Failure as failure:
        raise Refusal(Fault.ENGINE, f"the engine failed: {failure}", status=500) from None
    except TimeoutError:
        why = "the engine does not answer a small question; it may hang"
        raise Refusal(Fault.UNAVAILABLE, why, retry_after=5.0) from None
