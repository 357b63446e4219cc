"""One request at the endpoint's node: it waits its turn, talks to the engine, gives its place back."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Protocol

import aiohttp

from sollold.serving.engines import Engines
from sollold.serving.gate import Closed, Gate, LineFull
from sollold.serving.stall import Progress
from sollold.serving.wire import Begun, Break, Broken, Turn

log = logging.getLogger("sollold.serving")

_LLAMA_SPEED = re.compile(rb'"predicted_n":\s*(\d+).*?"predicted_per_second":\s*([0-9.eE+-]+)', re.DOTALL)
_OLLAMA_SPEED = re.compile(rb'"eval_count":\s*(\d+).*?"eval_duration":\s*(\d+)', re.DOTALL)
_TAIL = 4096
_COMMENT = ord(":")
"""What begins a line of an event stream that says nothing."""


class Failure(Exception):
    """The endpoint gave no answer, or not to the end."""

    def __init__(self, broken: Broken) -> None:
        super().__init__(broken.message)
        self.broken = broken

    @property
    def transport(self) -> bool:
        """Whether a circuit breaker counts it."""
        return self.broken.transport

    @property
    def kind(self) -> Break:
        """Its kind."""
        return self.broken.kind


class Stream(Protocol):
    """An engine's answer under way, wherever the engine is."""

    @property
    def begun(self) -> Begun:
        """The engine's status."""
        ...

    def chunks(self) -> AsyncIterator[bytes]:
        """The body in pieces, as they come.

        Raises:
            Failure: it broke off.
        """
        ...

    def end(self, broken: Broken) -> None:
        """Break it off from outside: whoever reads it gets `Failure`. For once it has begun."""
        ...

    async def close(self) -> None:
        """End the generation, if it is not at its end, and free its place. May be called twice."""
        ...


class Visit:
    """A `Stream` from an engine on this machine."""

    def __init__(
        self,
        turn: Turn,
        gate: Gate,
        engines: Engines,
        session: aiohttp.ClientSession,
        *,
        stall: float,
        begin: float = 0.0,
        speed: float,
        on_speed: Callable[[Visit, float, int], None],
        on_end: Callable[[Visit], None],
    ) -> None:
        """``stall``, ``begin``, ``speed``: as `Progress` takes them; ``on_speed`` is told a whole answer's
        tokens per second and how many they were; ``on_end`` is called once."""
        self.turn = turn
        self._gate = gate
        self._engines = engines
        self._session = session
        self._stack = AsyncExitStack()
        self._posting: asyncio.Task[None] | None = None
        self._response: aiohttp.ClientResponse | None = None
        self._begun: Begun | None = None
        self._broken: Broken | None = None
        self._on_speed = on_speed
        self._on_end = on_end
        self._ended = False
        self._loop = asyncio.get_running_loop()
        self._stall = stall
        self._begin = begin
        self._speed = speed
        self.progress: Progress | None = None
        """From the moment the engine has the request; None before."""
        self.alone = True
        """No other request was in the engine meanwhile."""

    @property
    def begun(self) -> Begun:
        """The engine's status."""
        assert self._begun is not None
        return self._begun

    @property
    def waits(self) -> bool:
        """Whether it stands in line still."""
        return self.progress is None

    async def open(self, on_position: Callable[[int], None]) -> None:
        """Wait for a turn, send the request, read the engine's status.

        Raises:
            Failure: FULL, MOVED, ENGINE, DEADLINE.
        """
        try:
            if self.turn.deadline > 0:
                async with asyncio.timeout(self.turn.deadline):
                    await self._enter(on_position)
            else:
                await self._enter(on_position)
        except TimeoutError:
            await self.close()
            raise Failure(Broken(Break.DEADLINE, "the deadline passed while the request waited")) from None
        except BaseException:
            await self.close()
            raise

    async def _enter(self, on_position: Callable[[int], None]) -> None:
        turn = self.turn
        came = self._loop.time()
        try:
            self._stack.enter_context(self._engines.busy(turn.endpoint, turn.keep_alive))
            if not turn.aside:
                await self._stack.enter_async_context(
                    self._gate.turn(turn.id, turn.priority, turn.client, turn.age, on_position)
                )
        except LookupError as error:
            raise Failure(Broken(Break.MOVED, str(error))) from None
        except LineFull as full:
            message = f"{self._gate.waiting} requests wait for this model already; try again later"
            raise Failure(Broken(Break.FULL, message, full.retry_after)) from None
        except Closed:
            raise self._failure("the endpoint takes no new work", Break.MOVED) from None
        if self._broken is not None:
            raise Failure(self._broken)
        waited = self._loop.time() - came
        self.alone = self._gate.active <= 1
        url = self._engines.url(turn.endpoint)
        if url is None:
            raise Failure(Broken(Break.MOVED, "the endpoint is gone"))
        self.progress = Progress(self._loop.time(), self._stall, self._speed, self._begin)
        try:
            # Only the body goes to the engine. A header such as X-Conversation-Id would make llama-server
            # go on generating after its caller has hung up.
            self._posting = asyncio.ensure_future(self._post(url + turn.path))
            await self._posting
        except (aiohttp.ClientError, OSError) as error:
            taken = not isinstance(error, aiohttp.ClientConnectorError)
            raise self._failure(f"the engine does not answer: {error}", transport=True, taken=taken) from None
        except asyncio.CancelledError:
            if self._broken is not None and self._posting is not None and self._posting.cancelled():
                raise Failure(self._broken) from None
            raise
        if self._broken is not None or self._response is None:
            raise self._failure("the engine does not answer")
        self._begun = Begun(self._response.status, (turn.age + waited) * 1000)

    async def _post(self, url: str) -> None:
        # Kept from here: whoever ends or closes the visit in this very moment must find it.
        self._response = await self._session.post(
            url, data=self.turn.body, headers={"Content-Type": "application/json"}
        )

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body in pieces.

        Raises:
            Failure: ENGINE when the engine died or hung; MOVED when the node is drained.
        """
        response, progress = self._response, self.progress
        assert response is not None and progress is not None
        read = response.content.readany
        now = self._loop.time
        last = before = b""
        try:
            while chunk := await read():
                if chunk[0] == _COMMENT and b"data:" not in chunk:
                    # llama-server says every half minute that it is there, though its workers hang. Nobody
                    # needs to hear it: nodes and callers get signs of life of our own.
                    continue
                progress.came(now())
                before, last = last, chunk
                yield chunk
                progress.wanted(now())
        except (aiohttp.ClientError, OSError) as error:
            raise self._failure(f"the engine broke off: {error}", transport=True, taken=True) from None
        if self._broken is not None:
            raise Failure(self._broken)
        self._measure((before[-_TAIL:] + last)[-_TAIL:])

    def end(self, broken: Broken) -> None:
        """Break it off from outside: whoever reads it gets `Failure`."""
        self._broken = replace(broken, taken=broken.kind is Break.ENGINE and not self.waits)
        if self._response is not None:
            self._response.close()
        elif self._posting is not None:
            self._posting.cancel()

    async def close(self) -> None:
        """Give the place back; the connection is closed, which ends a generation under way."""
        if self._ended:
            return
        self._ended = True
        if self._response is not None:
            self._response.close()
        elif self._posting is not None:
            self._posting.cancel()
        self._on_end(self)
        await self._stack.aclose()

    def _failure(
        self, message: str, kind: Break = Break.ENGINE, *, transport: bool = False, taken: bool = False
    ) -> Failure:
        """What was said from outside goes before what the connection says."""
        if self._broken is not None:
            return Failure(self._broken)
        return Failure(Broken(kind, message, transport=transport, taken=taken))

    def _measure(self, tail: bytes) -> None:
        """The engine's own account stands at the end of an answer."""
        speed, tokens = 0.0, 0
        if found := _LLAMA_SPEED.search(tail):
            speed, tokens = float(found[2]), int(found[1])
        elif (counted := _OLLAMA_SPEED.search(tail)) and int(counted[2]):
            tokens = int(counted[1])
            speed = tokens * 1e9 / int(counted[2])
        if speed > 0:
            self._on_speed(self, speed, tokens)
