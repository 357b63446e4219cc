"""Finding an engine that begins to answer: choose an endpoint or get one loaded, stand in line, begin."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import msgspec

from sollold.cluster.peer import PeerCalls
from sollold.cluster.view import View
from sollold.config import HttpSettings, ServingSettings
from sollold.serving.ask import Ask, Call, Engine, Fault, Refusal, Waiting
from sollold.serving.callers_name import body_for, callers_name
from sollold.serving.endpoint_server import EndpointServer
from sollold.serving.in_line import InLine
from sollold.serving.loader import Loader, Need, Ready, with_ready
from sollold.serving.relay import open_stream, whole
from sollold.serving.router import Candidate, Choice, Router, Wish
from sollold.serving.too_long import longest_input
from sollold.serving.visit import Failure, Stream
from sollold.serving.wire import Break, Broken, Turn

log = logging.getLogger("sollold.serving")

_RETHINK = 0.25
"""Seconds between two looks for a better endpoint while standing in line."""
ASIDE = ("/tokenize", "/detokenize", "/apply-template", "/v1/chat/completions/input_tokens")
"""Small questions that an engine answers beside its work."""
ASIDE_LIMIT = 20.0
"""Seconds in which an engine must have begun to answer such a question."""
FRUITLESS = 3
"""Engines that may end after the first, one after the other, with a request in them."""
FRUITLESS_EMBEDDING = 2
"""The same for embeddings: they are short, so engines that die over one die of it."""
_AGAIN = 0.3
"""Seconds before endpoints that failed just now are asked again."""


@dataclass(frozen=True, slots=True)
class Means:
    """What requests are answered with."""

    view: View
    calls: PeerCalls
    server: EndpointServer
    loader: Loader
    router: Router
    in_line: InLine
    serving: ServingSettings
    http: HttpSettings


@dataclass(slots=True)
class Leg:
    """An engine's answer under way: a request has one, and after each fault another."""

    choice: Choice
    stream: Stream
    call: Call

    @property
    def candidate(self) -> Candidate:
        """The endpoint."""
        return self.choice.candidate

    @property
    def renamed(self) -> Callable[[bytes], bytes] | None:
        """As `callers_name`."""
        return callers_name(self.candidate, self.call)


@dataclass(slots=True)
class _Death:
    """An engine that ended with the request in it. ``counts``: it may have been the request's doing."""

    endpoint: tuple[str, str]
    why: str
    counts: bool


class Finder:
    """Finds engines for one request, at first and after each fault."""

    def __init__(self, ask: Ask, wish: Wish, on_wait: Callable[[Waiting], None], means: Means) -> None:
        self._ask = ask
        self._wish = wish
        self._on_wait = on_wait
        self._means = means
        self._loop = asyncio.get_running_loop()
        self.came = self._loop.time()
        self.load_ms = 0.0
        self._sent = 0
        self._progressed = 0.0
        """When a load that is waited for after a fault last went forward, and how far it was then."""
        self._furthest = 0.0
        self._deaths: list[_Death] = []
        """Since anything was last delivered."""
        self._extra = {"request": ask.id}

    async def find(
        self,
        calls: dict[Engine, Call],
        limit: float,
        stage: str = "",
        without: frozenset[tuple[str, str]] = frozenset(),
    ) -> Leg:
        """An engine that has begun to answer.

        ``stage``: what waiting is called, when not by its own name, for an answer that is under way already;
        ``without``: endpoints that failed just now and are asked only when there is no other.

        Raises:
            Refusal: as its fault says.
        """
        means = self._means
        began = self._loop.time()
        wish = replace(self._wish, engines=frozenset(calls))
        tried = set(without)
        refused: Refusal | None = None
        wanted = ("", "")
        loaded = False
        ready: Ready | None = None
        full = ""
        self._furthest = 0.0
        while True:
            self._refuse_a_killer()
            now = self._loop.time()
            began = max(began, self._progressed)
            records = with_ready(means.view.live(), ready)
            ranked = means.router.rank(records, wish, now, frozenset(tried))
            if wanted[0]:
                # In line elsewhere it saw this one free.
                first = wanted
                ranked = tuple(sorted(ranked, key=lambda choice: choice.candidate.key != first))
                wanted = ("", "")
            if not ranked:
                if refused is not None:
                    if not self._may_shard(refused, wish):
                        raise refused
                    # An Ollama that has it can't hold it, or fails: the machines together may.
                    wish = replace(wish, engines=frozenset((Engine.LLAMA,)), told=("", ""))
                    said, refused = refused, None
                    log.info("an Ollama refused, so the leader is asked: %s", said, extra=self._extra)
                    try:
                        ready = await self._load(wish, limit, began, stage)
                    except Refusal as other:
                        # Why it does not fit says more than what Ollama could not do; nothing else does.
                        raise other if other.fault is Fault.TOO_BIG else said from None
                    loaded = True
                    continue
                if now - began > limit:
                    raise self._too_long(limit, full or "it could not be reached")
                ready = None
                if tried:
                    # The record still calls READY what does not answer: give its owner time to notice.
                    await self._news(_AGAIN)
                    tried.clear()
                    continue
                if loaded:
                    # The leader knows one that is READY; here it is not known yet, or not reachable.
                    await self._news(_AGAIN)
                ready = await self._load(wish, limit, began, stage)
                if ready is not None and 0 < ready.endpoint.context < wish.context:
                    # More than the model was trained with, or than fits: the leader gives what there is.
                    wish = replace(wish, context=ready.endpoint.context)
                if ready is not None:
                    wish = replace(wish, told=(ready.node, ready.endpoint.id))
                loaded = True
                continue
            loaded = False
            choice = ranked[0]
            leg = await self.enter(choice, calls[choice.candidate.engine], wish, stage)
            if isinstance(leg, Leg):
                return leg
            if isinstance(leg, Candidate):
                wanted = leg.key
                means.router.ended(wanted, None)
                continue
            tried.add(choice.candidate.key)
            if isinstance(leg, Refusal):
                # An answer under way is sent away by no full line: it asks again until the limit.
                if stage and leg.fault is Fault.UNAVAILABLE:
                    full = leg.message.removesuffix("; try again later")
                else:
                    refused = leg
            elif calls[choice.candidate.engine].path not in ASIDE:
                self._died(choice.candidate.key, leg)

    def _may_shard(self, refused: Refusal, wish: Wish) -> bool:
        """Whether a refusal was an Ollama's own fault, and llama.cpp could answer instead."""
        fails = refused.fault is Fault.ENGINE and (refused.status >= 500 or refused.status == 404)
        return fails and wish.engines == frozenset((Engine.LLAMA, Engine.OLLAMA))

    async def _news(self, limit: float) -> None:
        """Wait for a change in the cluster, ``limit`` seconds at the most."""
        changed = asyncio.Event()
        undo = self._means.view.subscribe(changed.set)
        try:
            async with asyncio.timeout(limit):
                await changed.wait()
        except TimeoutError:
            pass
        finally:
            undo()

    async def _load(self, wish: Wish, limit: float, since: float, stage: str) -> Ready | None:
        """``limit``: seconds that may be waited in all, from ``since`` on."""
        began = self._loop.time()
        # A stream that was broken off waits for as long as its model's load goes forward.
        waited = began - since
        need = Need(wish, self._ask.keep_alive, max(0.0, limit - waited), begun=bool(stage), waited=waited)
        on_wait = self._on_wait
        if stage:

            def on_wait(waiting: Waiting) -> None:
                if waiting.progress > self._furthest:
                    self._furthest, self._progressed = waiting.progress, self._loop.time()
                self._on_wait(Waiting(stage, waiting.progress, waiting.position, waiting.message))

        ready = await self._means.loader.ready(need, on_wait)
        self.load_ms += (self._loop.time() - began) * 1000
        return ready

    async def enter(
        self, choice: Choice, call: Call, wish: Wish, stage: str = "", *, aside: bool = False
    ) -> Leg | Candidate | Refusal | Failure:
        """Ask one endpoint. ``aside``: it needs no turn, as the questions of `ASIDE` need none.

        Answers the leg; or a better candidate, found while it stood in line; or why another endpoint
        should be tried (a `Refusal` is to be raised when there is none, a `Failure` to be waited out).

        Raises:
            Refusal: no endpoint would answer this.
        """
        means, candidate = self._means, choice.candidate
        node, endpoint = candidate.key
        now = self._loop.time()
        left = self.came + self._ask.deadline - now if self._ask.deadline > 0 else 0.0
        self._sent += 1
        turn = Turn(
            # A request that comes back to an endpoint may meet its own former self, not yet gone.
            id=self._ask.id if self._sent == 1 else f"{self._ask.id}.{self._sent}",
            endpoint=endpoint,
            path=call.path,
            body=msgspec.json.encode(body_for(candidate, call)),
            stream=self._ask.stream,
            priority=self._ask.priority,
            client=self._ask.client,
            age=now - self.came,
            deadline=max(left, 0.001) if self._ask.deadline > 0 else 0.0,
            keep_alive=self._ask.keep_alive,
            aside=aside or call.path in ASIDE,
        )
        nudge: asyncio.Future[None] | None = None

        def on_position(position: int) -> None:
            nonlocal nudge
            nudge = nudge or means.in_line.stand(candidate.key)
            self._on_wait(Waiting(stage or "queued", position=position))

        means.router.sent(candidate.key, wish, now)
        opening = asyncio.ensure_future(
            open_stream(means.view.me.node, node, turn, means.server, means.calls, on_position)
        )
        ok: bool | None = None
        try:
            while True:
                either = (opening,) if nudge is None else (opening, nudge)
                await asyncio.wait(either, timeout=_RETHINK, return_when=asyncio.FIRST_COMPLETED)
                if opening.done():
                    stream = opening.result()
                    break
                if turn.aside and self._loop.time() - now > ASIDE_LIMIT:
                    await _call_off(opening)
                    raise Failure(Broken(Break.DEADLINE, "the engine does not answer a small question"))
                if nudge is None:
                    continue
                if nudge.done():
                    nudge = means.in_line.stand(candidate.key)
                better = means.router.better(means.view.live(), wish, self._loop.time(), candidate.key)
                if better is not None:
                    # Claimed before anything is awaited: the others in line look for it too.
                    means.router.sent(better.key, wish, self._loop.time())
                    try:
                        await _call_off(opening)
                    except BaseException:
                        means.router.ended(better.key, None)
                        raise
                    means.router.ended(candidate.key, None)
                    return better
            refusal = await self._refused(stream, candidate)
        except Failure as failure:
            if failure.transport:
                means.router.failed(candidate.key, self._loop.time())
                ok = False
            means.router.ended(candidate.key, ok)
            # It may have broken off in the middle of an error's words.
            await _call_off(opening)
            return self._judge(failure)
        except BaseException:
            # Counted first: what follows may be cancelled once more.
            means.router.ended(candidate.key, None)
            await _call_off(opening)
            raise
        finally:
            if nudge is not None:
                means.in_line.leave(nudge)
        means.router.began(candidate.key, self._loop.time() - now)
        if refusal is not None:
            await stream.close()
            means.router.ended(candidate.key, refusal.status < 500)
            if candidate.engine is Engine.LLAMA and refusal.status != 503:
                raise refusal
            # An Ollama may lack the memory, or the model by now, where another does not.
            if refusal.status < 500 and refusal.status != 404:
                raise refusal
            return Failure(Broken(Break.MOVED, refusal.message)) if refusal.status == 503 else refusal
        return Leg(choice, stream, call)

    def _judge(self, failure: Failure) -> Refusal | Failure:
        if failure.kind is Break.FULL:
            return Refusal(
                Fault.UNAVAILABLE, failure.broken.message, retry_after=max(1.0, failure.broken.retry_after)
            )
        if failure.kind is Break.DEADLINE:
            raise Refusal(Fault.TIMEOUT, failure.broken.message)
        log.info("an endpoint did not answer: %s", failure, extra=self._extra)
        return failure

    async def _refused(self, stream: Stream, candidate: Candidate) -> Refusal | None:
        """The engine's own error, when its status is one.

        Raises:
            Failure: it broke off.
        """
        status = stream.begun.status
        if status < 400:
            return None
        return engine_refusal(status, await whole(stream, limit=1024 * 1024))

    def _too_long(self, limit: float, why: str) -> Refusal:
        message = f"model {self._wish.model!r} did not answer within {limit:.0f} s: {why}; try again later"
        return Refusal(Fault.UNAVAILABLE, message, retry_after=10.0)

    async def leave(self, leg: Leg, ok: bool | None) -> None:
        """Done with ``leg``. ``ok`` None: nothing is learned of the endpoint from it."""
        self._means.router.ended(leg.candidate.key, ok)
        await leg.stream.close()

    async def drop(self, leg: Leg, failure: Failure) -> None:
        """Done with ``leg``, which failed."""
        self._died(leg.candidate.key, failure)
        if failure.transport:
            self._means.router.failed(leg.candidate.key, self._loop.time())
        await self.leave(leg, False if failure.transport else None)

    def delivered(self) -> None:
        """The caller got something: what failed before is no sign against the request."""
        self._deaths.clear()

    def _died(self, key: tuple[str, str], failure: Failure) -> None:
        if failure.broken.taken:
            # Of a stream a word would have come, had all been well. Else only a crash is a sign.
            shows = self._ask.stream or self._ask.embedding
            self._deaths.append(_Death(key, str(failure), counts=shows))

    def _refuse_a_killer(self) -> None:
        """Give a request no further engine that has ended one after the other.

        Raises:
            Refusal: INTERRUPTED.
        """
        for death in self._deaths:
            death.counts = death.counts or self._crashed(death.endpoint)
        counted = [death for death in self._deaths if death.counts]
        if len(counted) > (FRUITLESS_EMBEDDING if self._ask.embedding else FRUITLESS):
            raise Refusal(
                Fault.INTERRUPTED,
                f"{len(counted)} engines ended one after the other with this request in them, at last: "
                f"{counted[-1].why}. Something in it may make them fail; ask in another way",
            )

    def _crashed(self, key: tuple[str, str]) -> bool:
        """Whether a process of the endpoint ended by a fault of its own, as its record says by now."""
        record = self._means.view.record(key[0])
        return record is not None and any(one.id == key[1] and one.crashed for one in record.endpoints)


async def _call_off(opening: asyncio.Future[Stream]) -> None:
    """End an opening, whether it is waiting or has come through in this very moment."""
    opening.cancel()
    results = await asyncio.gather(opening, return_exceptions=True)
    for result in results:
        if not isinstance(result, BaseException):
            await result.close()


class _ErrorDetail(msgspec.Struct):
    message: str = ""


class _ErrorBody(msgspec.Struct):
    error: _ErrorDetail | str = ""


def engine_refusal(status: int, body: bytes) -> Refusal:
    """What an engine answered with an error's status."""
    message = message_in(body) or f"the engine answered {status}"
    if longest_input(message) is not None:
        # llama-server calls a text too long to embed a failure of its own.
        status = 400
    return Refusal(Fault.ENGINE, message, status=status)


def message_in(body: bytes) -> str:
    """What an engine's error says, in OpenAI's form or Ollama's; empty when it can't be read."""
    try:
        error = msgspec.json.decode(body, type=_ErrorBody).error
    except msgspec.MsgspecError:
        return ""
    return error if isinstance(error, str) else error.message
