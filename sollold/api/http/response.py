"""Answers an `Ask`: opens it at the service, keeps the connection alive, encodes the answer.

Until there is an answer, a streamed request gets its headers after a grace period, and then bytes that its
clients ignore (`Encoder.keep_alive`). A refusal before the headers sets the status; after them it is an error
in the stream. If the caller hangs up, its handler is cancelled: it leaves the queue, or the generation ends.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import msgspec
from aiohttp import web
from msgspec.structs import replace

from sollold.api.http.encoder import Encoder
from sollold.api.http.errors import Dialect, is_final, is_too_long, refusal_bytes, retry_after, status_of
from sollold.api.http.inflight import InflightRequest, InflightRequests
from sollold.api.http.key_watch import LAST_WORDS_SECONDS, revoked
from sollold.api.http.routing_text import WARNING, header_text, routing_headers, sse_comment, waiting_text
from sollold.cluster.net.pieces import PIECE
from sollold.cluster.net.pour import Receiver
from sollold.errors import Fault, Refusal
from sollold.facts import dataclass
from sollold.serving.body_writer import BodyWriter, StreamedResponse
from sollold.serving.request import Answer, Ask, Engine, Routing, Service, Waiting

log = logging.getLogger("sollold.api")

SSE = "text/event-stream; charset=utf-8"
NDJSON = "application/x-ndjson"
JSON = "application/json; charset=utf-8"
_SHOULD_RETRY = "x-should-retry"
"""Header for the client libraries of OpenAI and Anthropic, which otherwise retry any request with a 5xx."""


@dataclass(frozen=True, slots=True)
class KeepAlive:
    """Timeouts of a connection, in seconds.

    ``grace``: wait for an answer, after which a streamed request gets its headers; ``every``: silence after
    which it gets a keep-alive; ``unread``: time without the caller reading anything, after which the
    connection is closed, since its engine waits for it.
    """

    grace: float = 2.0
    every: float = 5.0
    unread: float = 600.0


class ResponseContext(msgspec.Struct, frozen=True):
    """The services and settings that all `Reply` objects share."""

    service: Service
    keepalive: KeepAlive
    inflight: InflightRequests


def refusal_response(dialect: Dialect, refusal: Refusal, request: str) -> web.Response:
    """Return the response for a refusal before anything was sent. ``request``: the request's id."""
    headers = {}
    seconds = retry_after(refusal)
    if seconds is not None:
        headers["Retry-After"] = seconds
    if is_final(refusal):
        headers[_SHOULD_RETRY] = "false"
    status = status_of(refusal)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return web.Response(
        status=status,
        body=refusal_bytes(dialect, refusal, request),
        headers={"Content-Type": JSON, **headers},
    )


class Reply:
    """Answers one request. ``run`` returns the response, sent or ready to be sent."""

    def __init__(
        self,
        request: web.Request,
        context: ResponseContext,
        ask: Ask,
        encoder: Encoder,
        *,
        gather: Callable[[], Encoder] | None = None,
        warnings: tuple[str, ...] = (),
        too_long_in_stream: bool = False,
    ) -> None:
        """``gather`` makes another encoder like ``encoder``: the engine streams the answer, which is
        assembled here for a caller that does not stream. ``warnings``: apply if a llama-server answers.
        ``too_long_in_stream``: a stream always begins, and then reports that the prompt is too long."""
        self._request = request
        self._context = context
        self._service = context.service
        self._ask = replace(ask, gathered=True) if gather is not None else ask
        self._encoder = encoder
        self._gather = gather
        self._warnings = warnings
        self._too_long_in_stream = too_long_in_stream
        self._to_stream = ask.stream and gather is None
        self._keepalive = context.keepalive
        self._live: InflightRequest
        self._response: StreamedResponse | None = None
        self._writer: BodyWriter | None = None
        self._written = self._unread_since = time.monotonic()
        self._unread = (0, 0)
        """Bytes unread by the caller, and events so far, unchanged since `_unread_since`."""
        self._early: asyncio.Task[BodyWriter] | None = None
        """Sends the headers before an engine answers."""
        self._timer: asyncio.TimerHandle | None = None

    async def run(self) -> web.StreamResponse:
        """Send or return the answer.

        Raises:
            Refusal: nothing has been sent yet.
            CancelledError: the caller hung up.
        """
        with self._context.inflight.answering(self._request, self._ask) as self._live:
            return await self._streamed() if self._to_stream else await self._whole()

    async def _open(self) -> Answer:
        answer = await self._service.open(self._ask, self._live.wait)
        if answer.routing.engine is Engine.LLAMA:
            answer.routing.warnings = (*self._warnings, *answer.routing.warnings)
        return answer

    async def _streamed(self) -> web.StreamResponse:
        answer: Answer | BaseException | None = None
        grace_timer = asyncio.get_running_loop().call_later(self._keepalive.grace, self._begin_waiting)
        try:
            try:
                answer = await self._open()
            except BaseException as problem:
                begins = self._too_long_in_stream and isinstance(problem, Refusal) and is_too_long(problem)
                if self._early is None and not begins:
                    raise
                # The headers are sent, or will be: report it in the stream.
                answer = problem
            finally:
                grace_timer.cancel()
            if self._early is not None:
                writer = await self._early
            else:
                headers = routing_headers(answer.routing) if isinstance(answer, Answer) else {}
                writer = await self._prepare(headers)
            return await self._stream(answer, writer)
        finally:
            if self._timer is not None:
                self._timer.cancel()
            if isinstance(answer, Answer):
                await answer.end()

    def _begin_waiting(self) -> None:
        """The caller has waited for long: send the headers, and keep-alives from now on."""
        self._early = asyncio.ensure_future(self._prepare_waiting())

    async def _prepare_waiting(self) -> BodyWriter:
        writer = await self._prepare({"X-Sollold-Status": waiting_text(self._live.waiting)})
        self._watch(writer)
        return writer

    async def _prepare(self, headers: dict[str, str]) -> BodyWriter:
        response = self._response = StreamedResponse(
            headers={
                "Content-Type": self._encoder.content_type,
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
                **headers,
            }
        )
        writer = self._writer = await BodyWriter.begin(self._request, response)
        return writer

    def _write(self, data: bytes) -> bool:
        """Write ``data``; return whether the caller can take more."""
        if data:
            self._written = time.monotonic()
        return self._writer is not None and self._writer.write(data)

    async def _stream(self, answer: Answer | BaseException, writer: BodyWriter) -> web.StreamResponse:
        """Write the answer, or the error if there is none."""
        assert self._response is not None
        if self._timer is None:
            self._watch(writer)
        encoder, live = self._encoder, self._live
        last_words: float | None = None
        try:
            try:
                if isinstance(answer, BaseException):
                    raise answer
                self._live.answers(answer.routing)
                if "X-Sollold-Backend" not in self._response.headers:
                    # The headers were sent before this was known.
                    source = f"{answer.routing.backend} on {answer.routing.node}"
                    self._write(encoder.keep_alive(Waiting("answering", message=source)))
                self._write(encoder.begin(answer.routing))
                receive = self._receiver(answer.routing)
                while not await answer.pour(receive) and not encoder.finished:
                    await writer.drain()
                self._say_warnings(answer.routing)
                tail = encoder.finish(answer.routing)
            except (Refusal, asyncio.CancelledError) as error:
                refusal = error if isinstance(error, Refusal) else revoked(self._request)
                if refusal is None:
                    raise
                if refusal is not error:
                    # A caller that stops reading must not hold an engine with a revoked key.
                    last_words = LAST_WORDS_SECONDS
                log.info("stream ended with an error: %s", refusal.message, extra={"request": self._ask.id})
                live.failed(refusal)
                tail = encoder.fail(refusal)
            except ConnectionError:
                raise
            except Exception as error:
                live.failed(error)
                log.exception("internal error in a stream", extra={"request": self._ask.id})
                tail = encoder.fail(Refusal(Fault.INTERRUPTED, _UNEXPECTED))
            live.ended = True
            async with asyncio.timeout(last_words):
                await writer.write_eof(tail)
        except TimeoutError:
            writer.abort()
        except ConnectionError:
            live.cancelled()
            log.debug("the caller hung up", extra={"request": self._ask.id})
        return self._response

    def _receiver(self, routing: Routing) -> Receiver[list[bytes]]:
        """Return the function that writes a batch of events. It returns False if the answer is complete, or
        the caller can't take more."""
        encoder, live, resumed = self._encoder, self._live, 0
        assert self._writer is not None
        write = self._writer.write

        def receive(batch: list[bytes]) -> bool:
            nonlocal resumed
            if routing.resumed != resumed:
                resumed = routing.resumed
                self._live.answers(routing)
                self._say_resumed(routing)
            if len(batch) == 1:
                live.event(batch[0])
                data = encoder.event(batch[0])
            else:
                data = self._encode(batch)
            if data:
                self._written = live.last
            return write(data) and not encoder.finished

        return receive

    def _encode(self, batch: list[bytes]) -> bytes:
        """Return the bytes for a batch of events, up to the one that completes the answer."""
        encoder, live = self._encoder, self._live
        parts = []
        for raw in batch:
            live.event(raw)
            parts.append(encoder.event(raw))
            if encoder.finished:
                break
        return b"".join(parts)

    def _say_resumed(self, routing: Routing) -> None:
        """Report a resumption in a comment, if the stream has comments."""
        if self._encoder.content_type == SSE:
            times = f"{routing.resumed} times, {routing.gap_ms:.0f} ms without output in total"
            self._write(sse_comment(Waiting("resumed", message=times)))

    def _say_warnings(self, routing: Routing) -> None:
        """Report warnings that came after the headers in a comment, if the stream has comments."""
        assert self._response is not None
        reported = self._response.headers.get(WARNING, "")
        warnings = [warning for warning in routing.warnings if header_text(warning) not in reported]
        if warnings and self._encoder.content_type == SSE:
            self._write(sse_comment(Waiting("warning", message="; ".join(warnings))))

    def _watch(self, writer: BodyWriter) -> None:
        """Write keep-alives during silence; close an unread connection. Uses a timer: events cost nothing."""
        interval, now = self._keepalive.every, time.monotonic()
        state = writer.unsent, self._live.events
        if not state[0] or state != self._unread:
            self._unread, self._unread_since = state, now
        if now - self._unread_since > self._keepalive.unread:
            log.info(
                "closing the connection: the caller does not read its answer",
                extra={"request": self._ask.id},
            )
            writer.abort()
            return
        silent = now - self._written
        if silent >= interval:
            # A caller with unread bytes needs no keep-alive.
            if not state[0]:
                self._write(self._encoder.keep_alive(self._live.waiting))
            silent = 0.0
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(max(0.01, interval - silent), self._watch, writer)

    async def _whole(self) -> web.Response:
        answer = await self._open()
        try:
            self._live.answers(answer.routing)
            if self._gather is not None:
                await self._collect(answer, self._gather)
                body = b""
            else:
                body = await answer.whole()
                self._live.whole(body)
            if len(body) <= PIECE:
                data = self._encoder.whole(body, answer.routing)
            else:
                data = await asyncio.to_thread(self._encoder.whole, body, answer.routing)
        finally:
            await answer.end()
        return web.Response(body=data, headers={"Content-Type": JSON, **routing_headers(answer.routing)})

    async def _collect(self, answer: Answer, make: Callable[[], Encoder]) -> None:
        """Feed a stream to the encoder, for a caller that does not stream."""
        encoder = self._encoder
        encoder.begin(answer.routing)
        resumed = 0
        async for raw in answer.events:
            if answer.routing.resumed != resumed:
                resumed = answer.routing.resumed
                self._live.answers(answer.routing)
            if not raw:
                encoder = self._encoder = make()
                encoder.begin(answer.routing)
                continue
            self._live.event(raw)
            encoder.event(raw)
            if encoder.finished:
                break
        encoder.finish(answer.routing)


_UNEXPECTED = "internal error; see the node's log"


async def ask_whole(service: Service, ask: Ask, live: InflightRequest | None = None) -> tuple[bytes, Routing]:
    """Return the whole body of a request that is not streamed, for a dialect that processes it further.

    ``live``: the caller's request, which records what it waits for.

    Raises:
        Refusal: as `Service.open`.
    """
    answer = await service.open(ask, live.wait if live is not None else lambda _: None)
    try:
        if live is not None:
            live.answers(answer.routing)
        return await answer.whole(), answer.routing
    finally:
        await answer.end()


def json_response(value: object, headers: dict[str, str] | None = None) -> web.Response:
    """Return a response with ``value`` as JSON."""
    return web.Response(body=msgspec.json.encode(value), headers={"Content-Type": JSON, **(headers or {})})
