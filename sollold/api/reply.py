"""From an `Ask` to bytes at the caller: opens it, waits well, writes what a dialect's `Form` makes of it.

While nothing has come a streamed request gets its headers after a short grace, and then now and then
something that its client takes for nothing (a `Form` knows what). A refusal before the headers is a proper
status; after them it is an error in the stream. The caller's hang-up cancels the handler: the place in
line is given up, the generation ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from aiohttp import web

from sollold.api.fault_shape import Dialect, is_final, refusal_bytes, retry_after, status_of
from sollold.api.live import LiveRequests
from sollold.serving.ask import Answer, Ask, Fault, Refusal, Routing, Service, Waiting

log = logging.getLogger("sollold.api")

SSE = "text/event-stream; charset=utf-8"
NDJSON = "application/x-ndjson"
JSON = "application/json; charset=utf-8"
_SHOULD_RETRY = "x-should-retry"
"""What the client libraries of OpenAI and Anthropic go by; else they send again whatever got a 5xx."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How waiting is shown. Seconds.

    ``grace``: without an answer, then a streamed request gets its headers; ``every``: of silence, then it
    gets a sign of life; ``unread``: in which a caller takes nothing of what is there for it, then it is hung
    up on, since its engine waits for it.
    """

    grace: float = 2.0
    every: float = 5.0
    unread: float = 600.0


@dataclass(frozen=True, slots=True)
class Desk:
    """What every reply is given with."""

    service: Service
    patience: Patience
    live: LiveRequests


class Form(Protocol):
    """One answer in one dialect. Made anew for every request; every method but `keep_alive` is called once
    at most per event, in order.
    """

    dialect: Dialect
    content_type: str
    """Of the streamed answer."""

    @property
    def finished(self) -> bool:
        """The answer is whole though the engine has not ended: it is not listened to any more."""
        ...

    def begin(self, routing: Routing) -> bytes:
        """Bytes before the first event; the engine is known now."""
        ...

    def event(self, raw: bytes) -> bytes:
        """The bytes for one event of the engine; may be empty."""
        ...

    def end(self, routing: Routing) -> bytes:
        """Bytes after the last event."""
        ...

    def fail(self, refusal: Refusal) -> bytes:
        """An error in the stream, and whatever ends it."""
        ...

    def keep_alive(self, waiting: Waiting) -> bytes:
        """Bytes that the dialect's clients ignore."""
        ...

    def whole(self, raw: bytes, routing: Routing) -> bytes:
        """The body of an answer that is not streamed."""
        ...


def routing_headers(routing: Routing) -> dict[str, str]:
    """Where an answer comes from, as headers."""
    headers = {
        "X-Sollold-Backend": str(routing.backend),
        "X-Sollold-Node": _header_text(routing.node),
        "X-Sollold-Model": _header_text(routing.model),
    }
    if routing.devices:
        headers["X-Sollold-Devices"] = _header_text(",".join(routing.devices))
    if routing.resumed:
        headers["X-Sollold-Resumed"] = str(routing.resumed)
        headers["X-Sollold-Gap-Ms"] = f"{routing.gap_ms:.0f}"
    return headers


def _header_text(text: str) -> str:
    return "".join(c if " " <= c <= "~" else "?" for c in text)


def waiting_text(waiting: Waiting) -> str:
    """``loading 43 %``, ``queued, 3 ahead``: one short line, fit for a header or a comment."""
    text = waiting.stage
    if waiting.stage == "loading":
        text += f" {waiting.progress * 100:.0f} %"
    if waiting.stage == "queued" and waiting.position:
        text += f", place {waiting.position}"
    if waiting.message:
        text += f": {waiting.message}"
    return _header_text(text)[:300]


async def close(answer: Answer) -> None:
    """End an answer whose close is a coroutine function or a plain one."""
    result: Any = answer.close()
    if inspect.isawaitable(result):
        await result


def routing_object(routing: Routing, started: float) -> dict[str, Any]:
    """``_routing`` as callers see it; ``started`` on the monotonic clock."""
    shown: dict[str, Any] = {
        "backend": str(routing.backend),
        "duration_ms": round((time.monotonic() - started) * 1000, 3),
        "coordinator_url": routing.coordinator_url,
        "node": routing.node,
        "devices": list(routing.devices),
        "model": routing.model,
        "engine": str(routing.engine),
        "load_ms": round(routing.load_ms, 3),
        "queue_ms": round(routing.queue_ms, 3),
        "resumed": routing.resumed,
        "gap_ms": round(routing.gap_ms, 3),
    }
    if routing.scores:
        shown["scores"] = [
            {"endpoint": endpoint, "score": score, "why": why} for endpoint, score, why in routing.scores
        ]
    return shown


def refusal_response(dialect: Dialect, refusal: Refusal) -> web.Response:
    """A refusal before anything was sent."""
    headers = {}
    seconds = retry_after(refusal)
    if seconds is not None:
        headers["Retry-After"] = seconds
    if is_final(refusal):
        headers[_SHOULD_RETRY] = "false"
    return web.Response(
        status=status_of(refusal),
        body=refusal_bytes(dialect, refusal),
        headers={"Content-Type": JSON, **headers},
    )


class Reply:
    """One request's answer being given. ``run`` returns the response, sent or ready to be sent."""

    def __init__(
        self,
        request: web.Request,
        desk: Desk,
        ask: Ask,
        form: Form,
        *,
        gather: Callable[[], Form] | None = None,
    ) -> None:
        """``gather`` makes a form like ``form``: the whole of a stream is put together here."""
        self._request = request
        self._desk = desk
        self._service = desk.service
        self._ask = replace(ask, gathered=True) if gather is not None else ask
        self._form = form
        self._gather = gather
        self._to_stream = ask.stream and gather is None
        self._patience = desk.patience
        self._live = desk.live.enter(ask, request.path)
        self._waiting = Waiting("planning")
        self._response: web.StreamResponse | None = None
        self._written = time.monotonic()

    def _on_wait(self, waiting: Waiting) -> None:
        self._waiting = waiting
        self._live.waits(waiting)

    def _answers(self, routing: Routing) -> None:
        """An engine is at it, at first or after a fault: what was waited for is over."""
        self._waiting = Waiting("answering")
        self._live.answers(routing)

    async def run(self) -> web.StreamResponse:
        """Give the answer.

        Raises:
            Refusal: nothing has been sent yet.
            CancelledError: the caller hung up.
        """
        try:
            return await self._streamed() if self._to_stream else await self._whole()
        finally:
            self._desk.live.leave(self._live)

    async def _streamed(self) -> web.StreamResponse:
        opening = asyncio.ensure_future(self._service.open(self._ask, self._on_wait))
        answer: Answer | None = None
        try:
            await asyncio.wait((opening,), timeout=self._patience.grace)
            if opening.done():
                answer = opening.result()
                await self._prepare(routing_headers(answer.routing))
            else:
                await self._prepare({"X-Sollold-Status": waiting_text(self._waiting)})
            return await self._stream(opening)
        finally:
            await self._abandon(opening)

    async def _abandon(self, opening: asyncio.Future[Answer]) -> None:
        """Give up the place in line, or end the generation; to its end even when cancelled meanwhile."""
        if not opening.done():
            opening.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await opening
        if opening.done() and not opening.cancelled() and opening.exception() is None:
            await asyncio.shield(asyncio.ensure_future(close(opening.result())))

    async def _prepare(self, headers: dict[str, str]) -> None:
        response = web.StreamResponse(
            headers={
                "Content-Type": self._form.content_type,
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
                **headers,
            }
        )
        await response.prepare(self._request)
        self._response = response

    async def _write(self, data: bytes) -> None:
        if data and self._response is not None:
            self._written = time.monotonic()
            await self._response.write(data)

    async def _stream(self, opening: asyncio.Future[Answer]) -> web.StreamResponse:
        assert self._response is not None
        breath = asyncio.ensure_future(self._breathe())
        form, live, response = self._form, self._live, self._response
        try:
            try:
                answer = await asyncio.shield(opening) if not opening.done() else opening.result()
                self._answers(answer.routing)
                if form.content_type == SSE and "X-Sollold-Backend" not in response.headers:
                    # The headers went out before it was known: a comment says it.
                    source = f"{answer.routing.backend} on {answer.routing.node}"
                    await self._write(form.keep_alive(Waiting("answering", message=source)))
                await self._write(form.begin(answer.routing))
                resumed = 0
                async for raw in answer.events:
                    live.events += 1
                    if answer.routing.resumed != resumed:
                        resumed = answer.routing.resumed
                        self._answers(answer.routing)
                        await self._say_resumed(answer.routing)
                    data = form.event(raw)
                    if data:
                        self._written = time.monotonic()
                        await response.write(data)
                    if form.finished:
                        break
                tail = form.end(answer.routing)
            except Refusal as refusal:
                log.info(
                    "request refused in its stream: %s", refusal.message, extra={"request": self._ask.id}
                )
                tail = form.fail(refusal)
            except ConnectionError:
                raise
            except Exception:
                log.exception("request failed in its stream", extra={"request": self._ask.id})
                tail = form.fail(Refusal(Fault.INTERRUPTED, _UNEXPECTED))
            await self._write(tail)
            await response.write_eof()
        except ConnectionError:
            log.debug("the caller went away", extra={"request": self._ask.id})
        finally:
            breath.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await breath
        return response

    async def _say_resumed(self, routing: Routing) -> None:
        """A comment, where the dialect has no other place for it."""
        if self._form.content_type == SSE:
            times = f"{routing.resumed} times, without words for {routing.gap_ms:.0f} ms in all"
            await self._write(self._form.keep_alive(Waiting("resumed", message=times)))

    async def _breathe(self) -> None:
        """A sign of life after every so much silence. Apart from the events: it costs them nothing."""
        every, live = self._patience.every, self._live
        before, since = (0, 0), time.monotonic()
        while True:
            now = time.monotonic()
            transport = self._request.transport
            unread = transport.get_write_buffer_size() if transport is not None else 0
            if not unread or before != (unread, live.events):
                before, since = (unread, live.events), now
            if now - since > self._patience.unread and transport is not None:
                log.info("a caller does not read its answer", extra={"request": self._ask.id})
                transport.abort()
                return
            silent = now - self._written
            if silent >= every:
                # Who has something to read needs no sign of life.
                if not unread:
                    await self._write(self._form.keep_alive(self._waiting))
                silent = 0.0
            await asyncio.sleep(max(0.01, every - silent))

    async def _whole(self) -> web.Response:
        answer = await self._service.open(self._ask, self._on_wait)
        try:
            self._answers(answer.routing)
            if self._gather is not None:
                await self._collect(answer, self._gather)
                body = b""
            else:
                body = b"".join([raw async for raw in answer.events])
            data = self._form.whole(body, answer.routing)
        finally:
            await asyncio.shield(asyncio.ensure_future(close(answer)))
        return web.Response(body=data, headers={"Content-Type": JSON, **routing_headers(answer.routing)})

    async def _collect(self, answer: Answer, anew: Callable[[], Form]) -> None:
        """Feed a stream to the form, for a caller that wants the whole."""
        form = self._form
        form.begin(answer.routing)
        resumed = 0
        async for raw in answer.events:
            if answer.routing.resumed != resumed:
                resumed = answer.routing.resumed
                self._answers(answer.routing)
            if not raw:
                form = self._form = anew()
                form.begin(answer.routing)
                continue
            form.event(raw)
            if form.finished:
                break
        form.end(answer.routing)


_UNEXPECTED = "the node failed to give this answer for a reason it did not expect; its log says more"


async def ask_whole(service: Service, ask: Ask) -> tuple[bytes, Routing]:
    """The whole body of a request that is not streamed, for a dialect that puts it to its own use.

    Raises:
        Refusal: as `Service.open`.
    """
    answer = await service.open(ask, lambda _: None)
    try:
        return b"".join([raw async for raw in answer.events]), answer.routing
    finally:
        await asyncio.shield(asyncio.ensure_future(close(answer)))
