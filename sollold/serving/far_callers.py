"""At the endpoint's node: requests that other nodes were asked, as they come in over the peer route.

The request is one `sollold.serving.wire.Turn`, the answer a row of that module's frames.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Set
from typing import Any

import msgspec
from aiohttp import web

from sollold.serving.visit import Failure, Visit
from sollold.serving.wire import ALIVE, BEGUN, BROKEN, DATA, END, LARGEST_TURN, POSITION, Turn, frame, packed

log = logging.getLogger("sollold.serving")

_ALIVE_EVERY = 2.0
"""Seconds of silence towards a caller's node after which it is told that this one is still here."""


class Caller:
    """The far end of a visit from another node: frames out, its hang-up in."""

    def __init__(
        self, node: str, request: web.Request, response: web.StreamResponse, task: asyncio.Task[Any]
    ) -> None:
        self._request = request
        self._response = response
        self._loop = asyncio.get_running_loop()
        self.task = task
        self.node = node
        self.sent = self._loop.time()

    @property
    def gone(self) -> bool:
        """Whether the caller's node has closed the connection."""
        transport = self._request.transport
        return transport is None or transport.is_closing()

    async def send(self, data: bytes) -> None:
        """Write one frame."""
        self.sent = self._loop.time()
        await self._response.write(data)

    async def show_life(self) -> None:
        """Write a frame that says nothing else; soon given up when the other end takes nothing."""
        try:
            async with asyncio.timeout(0.1):
                await self.send(frame(ALIVE))
        except TimeoutError:
            log.debug("the asking node takes nothing")
        except ConnectionError:
            log.debug("the asking node went away")


class FarCallers:
    """All that are here now.

    Args:
        visit: begins a request at an endpoint of this node; raises `Failure` when it takes no work.
        who: tells the node id of whoever asks.
    """

    def __init__(self, visit: Callable[[Turn], Visit], who: Callable[[web.Request], str]) -> None:
        self._visit = visit
        self._who = who
        self._callers: set[Caller] = set()

    def tasks(self) -> list[asyncio.Task[Any]]:
        """Those that answer them."""
        return [caller.task for caller in self._callers]

    def keep(self, live: Set[str]) -> None:
        """End what nodes that are not among ``live`` have asked."""
        for caller in tuple(self._callers):
            if caller.node not in live:
                # Its machine may be off: then no packet ever says that the connection is gone.
                caller.task.cancel()

    async def beat(self, now: float) -> None:
        """End what is of those that have hung up; show those that heard nothing for long that we are here."""
        silent: list[Caller] = []
        for caller in tuple(self._callers):
            if caller.gone:
                caller.task.cancel()
            elif now - caller.sent >= _ALIVE_EVERY:
                silent.append(caller)
        # Between two frames, so nothing is cut; a full transport is left alone, and delays no other.
        await asyncio.gather(*(caller.show_life() for caller in silent))

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """The peer route.

        Raises:
            web.HTTPException: what is asked is too big or no `Turn`.
        """
        turn = await _read_turn(request)
        response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
        await response.prepare(request)
        task = asyncio.current_task()
        assert task is not None
        caller = Caller(self._who(request), request, response, task)
        self._callers.add(caller)
        extra = {"request": turn.id, "deployment": turn.endpoint}
        try:
            visit = self._visit(turn)
            try:
                await self._open(visit, caller)
                await caller.send(packed(BEGUN, visit.begun))
                async for chunk in visit.chunks():
                    await caller.send(frame(DATA, chunk))
            finally:
                await visit.close()
            await caller.send(frame(END))
        except Failure as failure:
            log.info("request broke off: %s", failure, extra=extra)
            with contextlib.suppress(ConnectionError):
                await caller.send(packed(BROKEN, failure.broken))
        except ConnectionError:
            log.debug("the asking node went away", extra=extra)
        finally:
            self._callers.discard(caller)
        return response

    async def _open(self, visit: Visit, caller: Caller) -> None:
        """Open ``visit`` while its caller hears of its place in line."""
        news = asyncio.Event()
        places: list[int] = []

        def on_position(place: int) -> None:
            places.append(place)
            news.set()

        opening = asyncio.ensure_future(visit.open(on_position))
        try:
            while not opening.done():
                hearing = asyncio.ensure_future(news.wait())
                try:
                    await asyncio.wait((opening, hearing), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    hearing.cancel()
                if places and not opening.done():
                    news.clear()
                    await caller.send(packed(POSITION, places[-1]))
                    places.clear()
        except BaseException:
            opening.cancel()
            await asyncio.gather(opening, return_exceptions=True)
            raise
        opening.result()


async def _read_turn(request: web.Request) -> Turn:
    """Read what is asked.

    Raises:
        web.HTTPException: it is too big or no `Turn`.
    """
    parts: list[bytes] = []
    size = 0
    pieces: AsyncIterator[bytes] = request.content.iter_any()
    async for piece in pieces:
        size += len(piece)
        if size > LARGEST_TURN:
            raise web.HTTPRequestEntityTooLarge(max_size=LARGEST_TURN, actual_size=size)
        parts.append(piece)
    try:
        return msgspec.msgpack.decode(b"".join(parts), type=Turn)
    except msgspec.MsgspecError as error:
        raise web.HTTPBadRequest(text=f"not a request for an endpoint: {error}") from None
