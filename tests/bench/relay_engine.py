"""A fast double of llama-server: `python -m tests.bench.relay_engine PORT`.

Like llama-server it sends one HTTP chunk per event, of the same size, at a steady rate. Its own cost is
negligible compared with that of the proxies.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import cast

import uvloop

PACE = 0.03
"""Seconds between two tokens of a stream. Fixed, since the API does not pass on unknown parameters."""
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\n%s\r\n\r\n"


def event(number: int) -> bytes:
    """Return chunk ``number`` of a chat."""
    choice = {"finish_reason": None, "index": 0, "delta": {"content": f"w{number:05} "}}
    chunk = {
        "choices": [choice],
        "created": 1795442783,
        "id": "chatcmpl-2V2x9zSRLM9W4q2NtkCMNrEa1U5diSn9",
        "model": "bench:latest",
        "system_fingerprint": "b11434-0c1e57098",
        "object": "chat.completion.chunk",
    }
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


EVENTS = [event(number) for number in range(2000)]


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


CHUNKS = [chunked(data) for data in EVENTS]
END = chunked(b"data: [DONE]\n\n") + b"0\r\n\r\n"
WHOLE = json.dumps(
    {
        "choices": [
            {"finish_reason": "stop", "index": 0, "message": {"role": "assistant", "content": "yes"}}
        ],
        "created": 1795442783,
        "model": "bench:latest",
        "system_fingerprint": "b11434-0c1e57098",
        "object": "chat.completion",
        "usage": {"completion_tokens": 2, "prompt_tokens": 12, "total_tokens": 14},
        "id": "chatcmpl-2V2x9zSRLM9W4q2NtkCMNrEa1U5diSn9",
        "timings": {
            "cache_n": 0,
            "prompt_n": 12,
            "prompt_ms": 81.3,
            "prompt_per_second": 147.6,
            "predicted_n": 2,
            "predicted_ms": 52.2,
            "predicted_per_second": 38.1,
        },
    },
    separators=(",", ":"),
).encode()


class Engine(asyncio.Protocol):
    def __init__(self) -> None:
        self._data = b""
        self._transport: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        if self._task is not None:
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, found, body = self._data.partition(b"\r\n\r\n")
        if not found:
            return
        lines = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        length = int(lines.get(b"content-length", b"0"))
        if len(body) < length:
            return
        self._data = body[length:]
        request = json.loads(body[:length])
        assert self._transport is not None
        if request.get("stream"):
            self._transport.write(_HEAD % (b"text/event-stream", b"Transfer-Encoding: chunked"))
            self._task = asyncio.create_task(self._stream(request["max_tokens"]))
        else:
            kind = b"application/json", b"Content-Length: %d" % len(WHOLE)
            self._transport.write(_HEAD % kind + WHOLE)

    async def _stream(self, tokens: int) -> None:
        assert self._transport is not None
        for number, chunk in enumerate(CHUNKS[:tokens]):
            if number:
                await asyncio.sleep(PACE)
            self._transport.write(chunk)
        self._transport.write(END)


async def main(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Engine, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
