"""A request at its endpoint's node: waits for a slot, streams the engine's response, frees the slot."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import replace
from math import isfinite

import msgspec

from sollold.cluster.gossip.record import Endpoint, State
from sollold.cluster.net.http_connection import HttpConnection, ResponseLost
from sollold.cluster.net.pour import Receiver
from sollold.engines.llamacpp.exit_reason import OUT_OF_MEMORY
from sollold.serving.admission import AdmissionQueue, CrashCause, QueueClosed, QueueFull
from sollold.serving.engine_client import EngineClient, EngineUnreachable
from sollold.serving.engines import EngineHost
from sollold.serving.protocol import EngineRequest, ErrorKind, ResponseHead, StreamError, Trial
from sollold.serving.watchdog import RequestProgress

log = logging.getLogger("sollold.serving")

_LLAMA_SPEED = re.compile(rb'"predicted_n":\s*(\d+).*?"predicted_per_second":\s*([0-9.eE+-]+)', re.DOTALL)
_LLAMA_DRAFTS = re.compile(rb'"draft_n":\s*(\d{1,12}),\s*"draft_n_accepted":\s*(\d{1,12})')
_OLLAMA_SPEED = re.compile(rb'"eval_count":\s*(\d+).*?"eval_duration":\s*(\d+)', re.DOTALL)
_TAIL_BYTES = 4096
"""Bytes at the end of a response that contain the engine's own figures."""
_COMMENT = ord(":")
"""First byte of a comment line in an event stream."""
_EVENT_END = b"\n\n"
_CRASH_SECONDS = 0.4
"""Time within which an engine's crash is noticed after its connection broke, in seconds."""
_HEADERS = {"Content-Type": "application/json"}


def _are_comments(piece: bytes, previous: bytes) -> bool:
    """Whether a piece that begins with a colon is whole comments of an event stream; ``previous``: the one
    before it, empty for none.

    A piece ends anywhere: it may begin with the colon, or end within the name, of a field.
    """
    starts_event = not previous or previous.endswith(_EVENT_END)
    return starts_event and piece.endswith(_EVENT_END) and b"data:" not in piece


def has_crashed(endpoint: Endpoint) -> bool:
    """Whether the engine crashed in a way that a request may have caused, not for lack of memory."""
    return endpoint.crashed and OUT_OF_MEMORY not in endpoint.reason


def crash_error(error: StreamError, stream: LocalStream, suspects: Collection[LocalStream]) -> StreamError:
    """Return ``error`` for a stream of a crashed engine: a single suspect is the cause of the crash."""
    if stream not in suspects:
        return error
    if len(suspects) == 1:
        return replace(error, crashed=True)
    # Engines mostly crash of what they have just received.
    *others, last = sorted(suspects, key=lambda other: other.sent)
    after = tuple(other.request.id for other in others) if stream is last else ()
    return replace(error, suspect=True, trial=Trial(stream.request.id, after))


class Figures(msgspec.Struct, frozen=True):
    """An engine's own figures for an answer: tokens per second, tokens, drafted and accepted draft tokens."""

    speed: float
    tokens: int
    drafted: int = 0
    accepted: int = 0


def figures_in(tail: bytes) -> Figures | None:
    """Return the figures at the end of a response; None if there are none."""
    start = tail.rfind(b'"predicted_n":')
    if start >= 0 and (match := _LLAMA_SPEED.match(tail, start)):
        speed, tokens = float(match[2]), int(match[1])
        if not (isfinite(speed) and speed > 0):
            return None
        drafts = _LLAMA_DRAFTS.search(tail, match.end())
        return Figures(speed, tokens, *(map(int, drafts.groups()) if drafts else ()))
    if (match := _OLLAMA_SPEED.search(tail)) and int(match[1]) and int(match[2]):
        return Figures(int(match[1]) * 1e9 / int(match[2]), int(match[1]))
    return None


class LocalStream:
    """A `Stream` from an engine on this machine."""

    def __init__(
        self,
        request: EngineRequest,
        queue: AdmissionQueue,
        host: EngineHost,
        client: EngineClient,
        *,
        stall: float,
        begin: float = 0.0,
        speed: float,
        on_speed: Callable[[LocalStream, Figures], None],
        on_end: Callable[[LocalStream], None],
        suspects: Callable[[], Collection[LocalStream]],
    ) -> None:
        """``stall``, ``begin``, ``speed``: see `RequestProgress`; ``on_speed`` is called with the figures of
        a complete answer; ``on_end`` is called once; ``suspects`` returns the requests of which one would be
        the cause if the engine crashed now."""
        self.request = request
        self.head: ResponseHead | None = None
        self.progress: RequestProgress | None = None
        """None until the request is being sent to the engine."""
        self.failure = ""
        """Why the stream broke off; empty if it did not."""
        self.sent = 0.0
        """When the request was sent to the engine, on the loop's clock."""
        self.alone = True
        """Whether no other request was in the engine at the same time."""
        self._queue = queue
        self._host = host
        self._client = client
        self._in_use = ExitStack()
        """Until it is closed, the engine does not count as idle."""
        self._connecting: asyncio.Timeout | None = None
        self._connection: HttpConnection | None = None
        self._previous = self._last = b""
        """The last two pieces of the body."""
        self._measured = False
        self._error: StreamError | None = None
        self._on_speed = on_speed
        self._on_end = on_end
        self._suspects = suspects
        self._ended = False
        self._loop = asyncio.get_running_loop()
        self._stall = stall
        self._begin = begin
        self._speed = speed

    @property
    def connected(self) -> bool:
        """Whether a connection was made for the request, so that the engine may have got it."""
        return self._connection is not None

    async def open(self, on_position: Callable[[int], None]) -> None:
        """Wait for a slot, send the request, and read the engine's status.

        Raises:
            StreamError: FULL, MOVED, ENGINE, DEADLINE.
        """
        try:
            async with asyncio.timeout(self.request.deadline or None):
                self.head = await self._begun(on_position)
        except TimeoutError:
            await self.close()
            raise StreamError(ErrorKind.DEADLINE, "the deadline passed while the request waited") from None
        except BaseException:
            await self.close()
            raise

    async def _begun(self, on_position: Callable[[int], None]) -> ResponseHead:
        """Wait for a slot, send the request, and return the head of the response."""
        request, arrived = self.request, self._loop.time()
        try:
            self._in_use.enter_context(self._host.busy(request.endpoint, request.keep_alive))
            if not request.bypass_queue or request.suspect:
                await self._queue.enter(
                    request.id,
                    request.priority,
                    request.client,
                    request.age,
                    on_position,
                    suspect=request.suspect,
                    trial=request.trial,
                )
        except LookupError as error:
            raise StreamError(ErrorKind.MOVED, str(error)) from None
        except QueueFull as full:
            message = f"{self._queue.waiting} requests already wait for this model; try again later"
            raise StreamError(ErrorKind.FULL, message, full.retry_after) from None
        except CrashCause:
            message = "an engine crashed with this request and others, and the others were answered since"
            raise StreamError(ErrorKind.ENGINE, message, crashed=True) from None
        except QueueClosed:
            raise self._error or StreamError(
                ErrorKind.MOVED, "the endpoint accepts no new requests"
            ) from None
        if self._error is not None:
            raise self._error
        self.alone = self._queue.active <= 1
        waited = request.age + self._loop.time() - arrived
        status = await self._send()
        return ResponseHead(status, waited * 1000, self.alone)

    async def _send(self) -> int:
        """Send the request and return the engine's status."""
        engine = self._host.address(self.request.endpoint)
        if engine is None:
            raise StreamError(ErrorKind.MOVED, "the endpoint no longer exists")
        self.sent = self._loop.time()
        self.progress = RequestProgress(self.sent, self._stall, self._speed, self._begin)
        path, headers = self.request.path, _HEADERS | engine.headers
        reused, lost = self._client.take_idle(engine.url), False
        try:
            # The caller's headers are not sent: X-Conversation-Id, for one, would make llama-server continue
            # generating after its caller has hung up. Connections are stored at once for `abort`, `close`.
            if reused is not None:
                try:
                    self._connection = reused
                    return await reused.ask("POST", path, headers, self.request.body)
                except ResponseLost:
                    # The engine may have closed it before reading the request (RFC 9112, 9.3.1).
                    if self._error is not None:
                        raise
                    lost = True
            self._connection = await self._connected(engine.url)
            return await self._connection.ask("POST", path, headers, self.request.body)
        except OSError as error:
            taken = lost or not isinstance(error, EngineUnreachable)
            raise await self._broken(f"the engine does not answer: {error}", taken, taken) from None

    async def _connected(self, url: str) -> HttpConnection:
        """Make a new connection.

        Raises:
            StreamError: the stream was aborted or closed meanwhile.
            OSError: connecting failed.
        """
        try:
            # Has no timeout of its own: `abort` and `close` expire it.
            async with asyncio.timeout(None) as self._connecting:
                connection = await self._client.connect(url)
        except TimeoutError:
            raise self._cancelled() from None
        finally:
            self._connecting = None
        if self._error is not None or self._ended:
            # In the turn of the loop in which the connection was made.
            connection.close()
            raise self._cancelled()
        return connection

    def _cancelled(self) -> StreamError:
        return self._error or StreamError(ErrorKind.MOVED, "the request was cancelled")

    async def pour(self, receive: Receiver[bytes]) -> bool:
        """Pass on the body in pieces.

        Raises:
            StreamError: ENGINE if the engine died or hung; otherwise the error given to `abort`.
        """
        connection, progress = self._connection, self.progress
        assert connection is not None and progress is not None
        now = self._loop.time

        def forward(chunk: bytes) -> bool:
            if chunk[0] == _COMMENT and _are_comments(chunk, self._last):
                # llama-server sends such keep-alives every half minute even if its workers hang. They are
                # dropped: sollold sends its own keep-alives to nodes and callers.
                return True
            if self.request.suspect and not progress.began:
                self._queue.answered(self.request.id)
            self._previous, self._last = self._last, chunk
            if receive(chunk):
                progress.forwarded(now())
                return True
            progress.received(now())
            return False

        if progress.began:
            progress.wanted(now())
        try:
            if not await connection.pour(forward):
                return False
        except ResponseLost as error:
            message = f"the connection to the engine broke: {error}"
            raise await self._broken(message, True, not self._last) from None
        if self._error is not None:
            raise self._error
        if not self._measured:
            self._measured = True
            figures = figures_in((self._previous[-_TAIL_BYTES:] + self._last)[-_TAIL_BYTES:])
            if figures is not None:
                self._on_speed(self, figures)
        return True

    def abort(self, error: StreamError) -> None:
        """Break off the stream from outside and free its slot: its reader gets ``error``."""
        taken = error.kind is ErrorKind.ENGINE and self.progress is not None
        self._error = replace(error, taken=taken)
        self.failure = error.message
        self._hang_up()
        if self.head is not None:
            # The task that would close it may wait for its caller for a long time.
            self._release()

    async def close(self) -> None:
        """Free the slot. The connection is closed, which ends a running generation, or kept for reuse."""
        self._release()

    def _release(self) -> None:
        if self._ended:
            return
        self._ended = True
        self._stop_connecting()
        if self._connection is not None:
            if self.request.stream:
                # llama-server closes it after a stream; a request sent on it before that is noticed is lost.
                self._connection.close()
            else:
                self._client.release(self._connection)
        self._on_end(self)
        self._queue.leave(self.request.id)
        self._in_use.close()

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
        else:
            self._stop_connecting()

    def _stop_connecting(self) -> None:
        if self._connecting is not None and not self._connecting.expired():
            self._connecting.reschedule(self._loop.time())

    async def _broken(self, message: str, taken: bool, unanswered: bool) -> StreamError:
        """Return the error for a broken connection; one given to `abort` takes precedence.

        ``unanswered``: there is no response to the request yet, so it may have crashed the engine.
        """
        suspects = self._suspects() if self._error is None and unanswered else ()
        crashed = self in suspects and await self._engine_crashed()
        error = self._error or StreamError(ErrorKind.ENGINE, message, transport=True, taken=taken)
        self.failure = error.message
        return crash_error(error, self, suspects) if crashed else error

    async def _engine_crashed(self) -> bool:
        """Whether the engine turns out to have crashed within `_CRASH_SECONDS` seconds."""
        try:
            async with asyncio.timeout(_CRASH_SECONDS):
                while (endpoint := self._host.endpoint(self.request.endpoint)) is not None:
                    if endpoint.state is not State.READY:
                        return has_crashed(endpoint)
                    await asyncio.sleep(_CRASH_SECONDS / 20)
        except TimeoutError:
            log.debug("the engine runs, although the connection broke", extra={"request": self.request.id})
        return False
