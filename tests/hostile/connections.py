"""Hostile connections to the HTTP port and to the peer port."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True, slots=True)
class Target:
    """A daemon's ports and a model that it serves."""

    host: str
    http: int
    peer: int
    model: str


def _post(path: str, body: bytes, length: int) -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode() + body


def _chat(target: Target, tokens: int) -> bytes:
    message = {"role": "user", "content": "count"}
    body = {
        "model": target.model,
        "messages": [message],
        "options": {"num_predict": tokens, "temperature": 0},
    }
    return json.dumps(body).encode()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection with RST."""
    link = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def slow_header(target: Target, streams: Streams) -> None:
    _, writer = streams
    for letter in b"GET /api/version HTTP/1.1\r\nHost: localhost\r\nX-A: " + b"a" * 1000:
        writer.write(bytes([letter]))
        await writer.drain()
        await asyncio.sleep(0.3)


async def slow_body(target: Target, streams: Streams) -> None:
    _, writer = streams
    writer.write(_post("/api/chat", b'{"model":"', 5000))
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.3)


async def silent(target: Target, streams: Streams) -> None:
    await asyncio.Event().wait()


async def closed_at_once(target: Target, streams: Streams) -> None:
    _, writer = streams
    writer.write(random.choice((b"", b"G", b"GET / HTTP/1.1\r\n")))


async def half_closed(target: Target, streams: Streams) -> None:
    reader, writer = streams
    body = _chat(target, 5)
    writer.write(_post("/api/chat", body[: random.choice((3, len(body)))], len(body)))
    writer.write_eof()
    await reader.read()


async def reset_in_body(target: Target, streams: Streams) -> None:
    _, writer = streams
    writer.write(_post("/v1/chat/completions", b'{"model":"' + b"x" * 20_000, 10**6))
    await writer.drain()
    await asyncio.sleep(random.random() * 0.1)
    _reset(writer)


async def reset_in_answer(target: Target, streams: Streams) -> None:
    reader, writer = streams
    body = _chat(target, 50)
    writer.write(_post("/api/chat", body, len(body)))
    await reader.readline()
    await asyncio.sleep(random.random() * 0.1)
    _reset(writer)


async def never_reads(target: Target, streams: Streams) -> None:
    """Request many large answers without reading any."""
    reader, writer = streams
    reader._transport.pause_reading()  # type: ignore[attr-defined]
    for _ in range(200):
        writer.write(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await asyncio.Event().wait()


async def pipelined(target: Target, streams: Streams) -> None:
    reader, writer = streams
    body = _chat(target, 2)
    writer.write(
        _post("/api/chat", body, len(body)) + b"GET /api/tags HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50
    )
    await reader.read(50_000)


async def garbage(target: Target, streams: Streams) -> None:
    reader, writer = streams
    writer.write(random.randbytes(random.choice((10, 5000, 300_000))))
    await reader.read()


async def tls_to_http(target: Target, streams: Streams) -> None:
    reader, writer = streams
    writer.write(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + random.randbytes(500))
    await reader.read()


async def http_to_tls(target: Target, streams: Streams) -> None:
    reader, writer = streams
    writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await reader.read()


async def handshake_then_garbage(target: Target, streams: Streams) -> None:
    """TLS without a member's certificate, followed by garbage."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(random.choice((["sollold"], ["h2"], ["sollold-join"], ["http/1.1"])))
    _, plain = streams
    plain.close()
    reader, writer = await asyncio.open_connection(target.host, target.peer, ssl=context)
    try:
        writer.write(random.randbytes(random.choice((4, 300, 100_000))))
        await reader.read()
    finally:
        writer.transport.abort()


async def half_a_handshake(target: Target, streams: Streams) -> None:
    _, writer = streams
    writer.write(b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03")
    await asyncio.Event().wait()


Kind = Callable[[Target, Streams], Awaitable[None]]
HTTP_KINDS: tuple[Kind, ...] = (
    slow_header, slow_body, silent, closed_at_once, half_closed, reset_in_body, reset_in_answer, never_reads,
    pipelined, garbage, tls_to_http,
)  # fmt: skip
PEER_KINDS: tuple[Kind, ...] = (
    silent, closed_at_once, garbage, http_to_tls, handshake_then_garbage, half_a_handshake,
)  # fmt: skip


async def connect(target: Target, count: int, seed: int, held: float) -> dict[str, int]:
    """Open ``count`` hostile connections almost simultaneously and return their number by kind.

    ``held``: maximum duration of each in seconds.
    """
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # writes to reset sockets are expected to fail
    choose = random.Random(seed)
    done: dict[str, int] = {}

    async def attempt(number: int) -> None:
        to_peer = number % 4 == 0
        kind = choose.choice(PEER_KINDS if to_peer else HTTP_KINDS)
        done[kind.__name__] = done.get(kind.__name__, 0) + 1
        await asyncio.sleep(choose.random() * held / 4)
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError, ValueError):
            port = target.peer if to_peer else target.http
            async with asyncio.timeout(held):
                streams = await asyncio.open_connection(target.host, port)
                try:
                    await kind(target, streams)
                finally:
                    streams[1].transport.abort()

    await asyncio.gather(*(attempt(number) for number in range(count)))
    return done
