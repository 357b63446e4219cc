"""A request on the endpoint's node that is cancelled before it reaches the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest

from sollold.cluster.net.http_connection import HttpConnection
from sollold.engines.address import EngineAddress
from sollold.serving.admission import AdmissionQueue
from sollold.serving.engine_client import EngineClient
from sollold.serving.local_stream import LocalStream
from sollold.serving.protocol import EngineRequest, ErrorKind, StreamError
from tests.doubles import until


class Unreachable:
    """An engine that never completes a connection; counts users and connection attempts."""

    def __init__(self) -> None:
        self.users = 0
        self.connecting = 0

    @contextmanager
    def busy(self, endpoint: str, keep_alive: float | None) -> Iterator[None]:
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1

    def address(self, endpoint: str) -> EngineAddress:
        return EngineAddress("http://192.0.2.1:1", "")

    def take_idle(self, url: str) -> HttpConnection | None:
        return None

    async def connect(self, url: str) -> HttpConnection:
        self.connecting += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.connecting -= 1
        raise AssertionError


def local_stream(engine: Unreachable, queue: AdmissionQueue) -> LocalStream:
    return LocalStream(
        EngineRequest("r", "d", "/v1/chat/completions", b"{}", True),
        queue,
        cast(Any, engine),
        cast(EngineClient, engine),
        stall=10.0,
        speed=0.0,
        on_speed=lambda stream, figures: None,
        on_end=lambda stream: None,
        is_newest=lambda stream: True,
    )


async def test_abort_while_connecting() -> None:
    engine, queue = Unreachable(), AdmissionQueue(1, 1)
    stream = local_stream(engine, queue)
    opening = asyncio.ensure_future(stream.open(lambda position: None))
    await until(lambda: engine.connecting)
    assert engine.users == queue.active == 1
    stream.abort(StreamError(ErrorKind.MOVED, "the node is drained"))
    with pytest.raises(StreamError, match="the node is drained"):
        await asyncio.wait_for(opening, 5)
    assert engine.connecting == engine.users == queue.active == 0


async def test_caller_cancels_while_connecting() -> None:
    engine, queue = Unreachable(), AdmissionQueue(1, 1)
    opening = asyncio.ensure_future(local_stream(engine, queue).open(lambda position: None))
    await until(lambda: engine.connecting)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert engine.connecting == engine.users == queue.active == 0


async def test_close_while_connecting() -> None:
    engine, queue = Unreachable(), AdmissionQueue(1, 1)
    stream = local_stream(engine, queue)
    opening = asyncio.ensure_future(stream.open(lambda position: None))
    await until(lambda: engine.connecting)
    await stream.close()
    with pytest.raises(StreamError, match="cancelled"):
        await asyncio.wait_for(opening, 5)
    assert engine.connecting == engine.users == queue.active == 0
