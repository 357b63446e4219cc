"""At the endpoint's node: handles requests that other nodes forward over the peer route.

The request is one `sollold.serving.protocol.EngineRequest`, the response a sequence of that module's frames.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Set
from io import BytesIO
from typing import Any

from aiohttp import web

from sollold.serving.body_writer import BodyWriter, StreamedResponse
from sollold.serving.local_stream import LocalStream
from sollold.serving.protocol import (
    ALIVE,
    BEGUN,
    BROKEN,
    DATA,
    END,
    LARGEST_REQUEST,
    POSITION,
    EngineRequest,
    ResponseHead,
    StreamError,
    frame,
    packed,
    read_request,
)
from sollold.undecodable import UNDECODABLE

log = logging.getLogger("sollold.serving")

_SILENCE_SECONDS = 30.0
"""Seconds without a byte of a request after which its node counts as dead."""
_LONGEST_TOGETHER = 16 * 1024
"""Maximum bytes of a piece that is copied to be written together with others."""
_ALIVE_SECONDS = 2.0
"""Seconds without a frame to a caller's node after which it gets a keep-alive."""


class PeerCaller:
    """The connection to the node that forwarded a request: sends frames, and detects disconnection."""

    def __init__(self, node: str, writer: BodyWriter, task: asyncio.Task[Any]) -> None:
        self._writer = writer
        self._loop = asyncio.get_running_loop()
        self.task = task
        self.node = node
        self.sent = self._loop.time()

    @property
    def gone(self) -> bool:
        """Whether the connection is closed."""
        return self._writer.gone

    def send(self, data: bytes) -> bool:
        """Write one frame. Return whether the node accepts more; if not, await `drain` first."""
        self.sent = self._loop.time()
        return self._writer.write(data)

    def tell_position(self, position: int) -> None:
        """Write the request's position in the queue."""
        self.send(packed(POSITION, position))

    def begin(self, head: ResponseHead) -> None:
        """Write that the engine has begun to respond, together with the start of the body if it is there."""
        self.sent = self._loop.time()
        self._writer.write_soon(packed(BEGUN, head))

    def pass_on(self, chunk: bytes) -> bool:
        """Write a piece of the engine's body."""
        return self.send(frame(DATA, chunk))

    def pass_on_together(self, chunk: bytes) -> bool:
        """Write a piece of a body of which nothing is read before its end, with that if it is there."""
        if len(chunk) > _LONGEST_TOGETHER:
            return self.pass_on(chunk)
        self.sent = self._loop.time()
        return self._writer.write_soon(frame(DATA, chunk))

    def show_life(self) -> None:
        """Write a keep-alive frame, unless earlier data is still unsent."""
        if not self._writer.unsent:
            # Never inside another frame, since nothing is pending.
            self.send(frame(ALIVE))

    async def drain(self) -> None:
        """Wait until the node has read most of the data.

        Raises:
            ConnectionError: the connection is closed.
        """
        await self._writer.drain()

    async def write_last(self, last: bytes) -> None:
        """Write the last frame and complete the response.

        Raises:
            ConnectionError: the connection is closed.
        """
        await self._writer.write_eof(last)


class PeerRequestHandler:
    """Handles the requests of other nodes.

    Args:
        begin: returns a stream for a request at an endpoint of this node; raises `StreamError` if refused.
        node_of: returns the authenticated node id of a request's connection.
    """

    def __init__(
        self, begin: Callable[[EngineRequest], LocalStream], node_of: Callable[[web.Request], str]
    ) -> None:
        self._begin = begin
        self._node_of = node_of
        self._callers: set[PeerCaller] = set()

    def tasks(self) -> list[asyncio.Task[Any]]:
        """The tasks of running requests."""
        return [caller.task for caller in self._callers]

    def end_all_but(self, live: Set[str]) -> None:
        """End the requests of nodes that are not among ``live``."""
        for caller in tuple(self._callers):
            if caller.node not in live:
                # Its machine may be off, so that the connection is never closed.
                caller.task.cancel()

    def check(self, now: float) -> None:
        """End the requests of disconnected callers; send keep-alives to the others where due."""
        for caller in tuple(self._callers):
            if caller.gone:
                caller.task.cancel()
            elif now - caller.sent >= _ALIVE_SECONDS:
                caller.show_life()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Handle the peer route.

        Raises:
            web.HTTPException: the body is too big, not an `EngineRequest`, or stops arriving.
        """
        engine_request = await _read_request(request)
        response = StreamedResponse(headers={"Content-Type": "application/octet-stream"})
        writer = await BodyWriter.begin(request, response, hold=True)
        task = asyncio.current_task()
        assert task is not None
        caller = PeerCaller(self._node_of(request), writer, task)
        self._callers.add(caller)
        receive = caller.pass_on if engine_request.stream else caller.pass_on_together
        extra = {"request": engine_request.id, "deployment": engine_request.endpoint}
        try:
            stream = self._begin(engine_request)
            try:
                await stream.open(caller.tell_position)
                assert stream.head is not None
                caller.begin(stream.head)
                while not await stream.pour(receive):
                    await caller.drain()
            finally:
                await stream.close()
            await caller.write_last(frame(END))
        except StreamError as error:
            log.info("stream interrupted: %s", error, extra=extra)
            with contextlib.suppress(ConnectionError):
                await caller.write_last(packed(BROKEN, error))
        except ConnectionError:
            log.debug("the requesting node disconnected", extra=extra)
        finally:
            self._callers.discard(caller)
        return response


async def _read_request(request: web.Request) -> EngineRequest:
    """Read a peer's request.

    Raises:
        web.HTTPException: it is too big, not an `EngineRequest`, or stops arriving.
    """
    content = request.content
    # In one piece with its headers, as small requests come, it needs no time limit.
    raw = content.read_nowait() if content.is_eof() else await _gather(request)
    try:
        return await read_request(raw)
    except UNDECODABLE as error:
        raise web.HTTPBadRequest(text=f"not a valid request for an endpoint: {error}") from None


async def _gather(request: web.Request) -> bytes:
    """Read the body piece by piece.

    Raises:
        web.HTTPException: it is too big or stops arriving.
    """
    raw = BytesIO()
    pieces: AsyncIterator[bytes] = request.content.iter_any()
    now = asyncio.get_running_loop().time
    try:
        async with asyncio.timeout(_SILENCE_SECONDS) as limit:
            async for piece in pieces:
                raw.write(piece)
                if raw.tell() > LARGEST_REQUEST:
                    raise web.HTTPRequestEntityTooLarge(max_size=LARGEST_REQUEST, actual_size=raw.tell())
                limit.reschedule(now() + _SILENCE_SECONDS)
    except TimeoutError:
        raise web.HTTPRequestTimeout from None
    return raw.getvalue()
