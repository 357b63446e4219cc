"""At the node asked: a stream from the endpoint's node, and the engine's events cut out of it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import replace

import aiohttp
import msgspec

from sollold.cluster.peer import PeerCalls, PeerError
from sollold.serving.ask import Engine
from sollold.serving.endpoint_server import EndpointServer
from sollold.serving.resume_state import read as read_event
from sollold.serving.visit import Failure, Stream
from sollold.serving.wire import (
    BEGUN,
    BROKEN,
    DATA,
    END,
    PATH,
    POSITION,
    BadFrame,
    Begun,
    Break,
    Broken,
    Frames,
    Turn,
)

_CONNECT = 3.0
_SILENCE = 7.0
"""Seconds without any frame after which the endpoint's node is taken for gone; it speaks every 2 s."""
_LOST = (aiohttp.ClientError, OSError, TimeoutError, PeerError)


class RemoteStream:
    """A `Stream` from an engine on another node."""

    def __init__(self, calls: PeerCalls, node: str, turn: Turn) -> None:
        self._calls = calls
        self._node = node
        self._turn = turn
        self._stack = AsyncExitStack()
        self._response: aiohttp.ClientResponse | None = None
        self._frames = Frames()
        self._early: list[tuple[int, bytes]] = []
        self._begun: Begun | None = None
        self._ended: Broken | None = None

    @property
    def begun(self) -> Begun:
        """The engine's status."""
        assert self._begun is not None
        return self._begun

    async def open(self, on_position: Callable[[int], None]) -> None:
        """Ask the endpoint's node, stand in its line, get the engine's status.

        Raises:
            Failure: as `Broken` says.
        """
        try:
            await self._open(on_position)
        except _LOST as error:
            await self.close()
            raise self._cut(error) from None
        except BaseException:
            await self.close()
            raise

    async def _open(self, on_position: Callable[[int], None]) -> None:
        exchange = self._calls.stream(
            self._node,
            "POST",
            PATH,
            headers={"Content-Type": "application/msgpack"},
            data=msgspec.msgpack.encode(self._turn),
            connect_timeout=_CONNECT,
            idle_timeout=_SILENCE,
        )
        response = self._response = await self._stack.enter_async_context(exchange)
        if response.status != 200:
            raise Failure(Broken(Break.ENGINE, f"node {self._node} answered {response.status}"))
        while True:
            data = await response.content.readany()
            if not data:
                raise _cut_off(f"node {self._node} broke off")
            frames = self._feed(data)
            for at, (kind, payload) in enumerate(frames):
                if kind == POSITION:
                    on_position(msgspec.msgpack.decode(payload, type=int))
                elif kind == BROKEN:
                    raise _broken(payload)
                elif kind == BEGUN:
                    self._begun = msgspec.msgpack.decode(payload, type=Begun)
                    self._early = frames[at + 1 :]
                    return

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body in pieces.

        Raises:
            Failure: it broke off.
        """
        assert self._response is not None
        read = self._response.content.readany
        feed = self._feed
        frames = self._early
        try:
            while True:
                for kind, payload in frames:
                    if kind == DATA:
                        yield payload
                    elif kind == END:
                        # To the very end, so that the connection can be used again.
                        with contextlib.suppress(*_LOST):
                            await read()
                        return
                    elif kind == BROKEN:
                        raise _broken(payload)
                data = await read()
                if not data:
                    raise _cut_off(f"node {self._node} broke off")
                frames = feed(data)
        except _LOST as error:
            raise self._cut(error) from None

    def end(self, broken: Broken) -> None:
        """Break it off: the endpoint's node is known to be gone, say. Whoever reads it gets `Failure`."""
        self._ended = broken
        if self._response is not None:
            self._response.close()

    async def close(self) -> None:
        """Hang up; a connection whose answer was read to its end stays open for the next."""
        if self._response is not None and not self._response.content.at_eof():
            self._response.close()
        with contextlib.suppress(*_LOST):
            await self._stack.aclose()

    def _feed(self, data: bytes) -> list[tuple[int, bytes]]:
        try:
            return self._frames.feed(data)
        except BadFrame as error:
            raise _cut_off(f"node {self._node} sent {error}") from None

    def _cut(self, error: BaseException) -> Failure:
        if self._ended is not None:
            return Failure(replace(self._ended, transport=self._ended.kind is Break.ENGINE))
        why = str(error) or type(error).__name__
        return _cut_off(f"node {self._node} was lost: {why}")


def _cut_off(why: str) -> Failure:
    return Failure(Broken(Break.ENGINE, why, transport=True))


def _broken(payload: bytes) -> Failure:
    return Failure(msgspec.msgpack.decode(payload, type=Broken))


async def open_stream(
    me: str,
    node: str,
    turn: Turn,
    server: EndpointServer,
    calls: PeerCalls,
    on_position: Callable[[int], None],
) -> Stream:
    """A stream from an endpoint, without network when it is on this node.

    Raises:
        Failure: there is none.
    """
    if node == me:
        visit = server.visit(turn)
        await visit.open(on_position)
        return visit
    remote = RemoteStream(calls, node, turn)
    await remote.open(on_position)
    return remote


class Events:
    """Cuts an engine's body into events, and knows whether its end was the end."""

    def __init__(self, engine: Engine, path: str) -> None:
        self._lines = engine is Engine.OLLAMA and path.startswith("/api/")
        self._done_word = _done_word(path)
        self._rest = b""
        self._last = b""
        self.done = False
        """Whether the body has come to the end that the engine announces."""

    def feed(self, data: bytes) -> list[bytes]:
        """The events that are whole now: payloads of ``data:`` lines, or lines."""
        if self._rest:
            data = self._rest + data
        if self._lines:
            return self._cut_lines(data)
        parts = data.split(b"\n\n")
        self._rest = parts.pop()
        events = []
        for part in parts:
            if part.startswith(b"data: "):
                payload = part[6:]
            else:
                at = part.find(b"data:")
                if at < 0 or (at and part[at - 1] != 10):
                    continue
                payload = part[at + 5 :].strip()
            if payload == b"[DONE]":
                self.done = True
            else:
                events.append(payload)
        if events:
            self._last = events[-1]
        return events

    def _cut_lines(self, data: bytes) -> list[bytes]:
        events = data.split(b"\n")
        self._rest = events.pop()
        events = [event for event in events if event]
        if events:
            self._last = events[-1]
        return events

    @property
    def over(self) -> bool:
        """Whether the engine has said that there is no more, however the body ended."""
        if self._lines:
            # The word may stand in a tool call's arguments, too.
            last = read_event(self._last)
            return last is not None and last.get("done") is True
        return self.done or any(word in self._last for word in self._done_word)

    def finish(self) -> list[bytes]:
        """The body has ended: an event whose end-of-line was left out, and `done` gets its last word."""
        events: list[bytes] = []
        if self._rest.strip():
            events = self.feed(b"\n" if self._lines else b"\n\n")
        self.done = self.over
        return events


def _done_word(path: str) -> tuple[bytes, ...]:
    """What the last of an event stream's events contains, where it does not end with ``[DONE]``."""
    if path.startswith("/v1/messages"):
        return (b'"message_stop"',)
    if path.startswith("/v1/responses"):
        return (b'"response.completed"', b'"response.failed"', b'"response.incomplete"')
    if path.startswith(("/completion", "/infill")):
        return (b'"stop":true',)
    return ()


async def whole(stream: Stream, limit: int = 256 * 1024 * 1024) -> bytes:
    """The whole body.

    Raises:
        Failure: it broke off, or is longer than ``limit`` bytes.
    """
    parts: list[bytes] = []
    size = 0
    async for chunk in stream.chunks():
        parts.append(chunk)
        size += len(chunk)
        if size > limit:
            raise Failure(Broken(Break.ENGINE, f"the answer is longer than {limit} bytes"))
    return b"".join(parts)
