"""Request bodies that are costly to decode: they are refused early and don't block the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import sys
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from typing import Any

import psutil
import pytest
from aiohttp import ClientConnectionError, ClientSession
from hypothesis import given
from hypothesis import strategies as st

from sollold.api.http.json_bounds import MOST_CONTAINERS, MOST_KEYS, MOST_VALUES, JsonBounds, TooManyValues
from tests.api.api_parts import TRUSTED_PROXIES, ScriptedService, chunk, model, parts
from tests.api.conftest import Serve
from tests.api.watched_loop import watched
from tests.doubles import until

MIB = 1 << 20

VALUES = st.recursive(
    st.none() | st.integers() | st.text(alphabet='ab"\\,[]{}:\n\u00e9\ud7ff'),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(alphabet='k"\\,['), inner),
)


def count_values(value: object) -> tuple[int, int]:
    """(Containers, commas) of the value's JSON."""
    if isinstance(value, list | dict):
        inner = [
            count_values(inner_value)
            for inner_value in (value.values() if isinstance(value, dict) else value)
        ]
        commas = max(0, len(inner) - 1) + sum(commas for _, commas in inner)
        return 1 + sum(containers for containers, _ in inner), commas
    return 0, 0


@given(VALUES, st.lists(st.integers(0, 200)), st.booleans())
def test_values_outside_strings_are_counted_in_any_chunks(
    value: object, cuts: list[int], ascii_: bool
) -> None:
    raw = json.dumps(value, ensure_ascii=ascii_).encode()
    containers, commas = count_values(value)
    places = [0, *sorted(cut for cut in cuts if cut < len(raw)), len(raw)]

    def feed(bounds: JsonBounds) -> None:
        for begin, end in pairwise(places):
            bounds.feed(raw[begin:end])

    feed(JsonBounds(containers, containers + commas))
    if containers:
        with pytest.raises(TooManyValues, match="objects and arrays"):
            feed(JsonBounds(containers - 1, 10**9))
        with pytest.raises(TooManyValues, match="values"):
            feed(JsonBounds(10**9, containers + commas - 1))


ATTACKS: dict[str, tuple[str, bytes, bytes, int]] = {
    "lists": ("/api/show", b'{"model":"demo","x":[', b"[],", 120 * MIB),
    "messages": ("/api/chat", b'{"model":"demo","messages":[', b"{},", 100 * MIB),
    "strings": ("/v1/chat/completions", b'{"model":"demo","messages":[', b'"",', 100 * MIB),
    "keys": ("/v1/messages", b'{"model":"demo","metadata":{', b'"":0,', 100 * MIB),
    "nested": ("/v1/responses", b'{"model":"demo","input":', b"[{", 20 * MIB),
}


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "chunked"])
@pytest.mark.parametrize("name", ATTACKS)
async def test_a_body_of_millions_of_values_is_refused(
    serve: Serve, http: ClientSession, name: str, announced: bool
) -> None:
    path, head, piece, size = ATTACKS[name]
    url = await serve(parts())
    block = piece * (65536 // len(piece))
    sent = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal sent
        yield head
        while sent < size:
            sent += len(block)
            yield block

    headers = {"Content-Length": str(len(head) + size)} if announced else {}
    before = psutil.Process().memory_info().rss
    async with watched() as loop:
        try:
            async with http.post(url + path, data=body(), headers=headers) as answer:
                assert answer.status in (400, 413)
                assert "error" in await answer.json()
        except ClientConnectionError:
            pass  # refused while it was still being sent
    assert sent < 16 * MIB, "refused long before its end"
    assert loop.longest < 0.05
    assert loop.most_memory - before < 64 * MIB
    async with http.get(url + "/api/version") as answer:
        assert answer.status == 200


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"messages": [{}] * MOST_CONTAINERS}, "objects and arrays"),
        ({"stop": ["x"] * MOST_VALUES}, "values"),
        ({"metadata": {f"k{number}": 0 for number in range(MOST_KEYS)}}, "names in its objects"),
        ({"messages": [{}] * 4097}, "messages has more than 4096 items"),
        ({"input": [{}] * 4097}, "input has more than 4096 items"),
        ({"tools": [{}] * 513}, "tools has more than 512 items"),
    ],
)
async def test_a_refusal_names_the_limit(
    serve: Serve, http: ClientSession, fields: dict[str, Any], why: str
) -> None:
    url = await serve(parts())
    async with http.post(url + "/api/chat", data=json.dumps({"model": "demo"} | fields)) as answer:
        assert answer.status == 400 and why in (await answer.json())["error"]


async def test_realistic_large_bodies_pass(serve: Serve, http: ClientSession) -> None:
    service = ScriptedService(chunk(finish="stop"))
    url = await serve(parts(service, model(capabilities=("completion", "tools"))))
    field = {"type": "string", "description": '[x], {y}, "z"'}
    schema = {"type": "object", "properties": {f"p{n}": field for n in range(20)}}
    tools = [{"type": "function", "function": {"name": f"t{k}", "parameters": schema}} for k in range(200)]
    messages = [
        {"role": ("user", "assistant")[k % 2], "content": 'a, [b], {c} \\ " ' * 50} for k in range(1001)
    ]
    body = {"model": "demo", "messages": messages, "tools": tools, "stream": False}
    async with watched() as loop:
        async with http.post(url + "/api/chat", json=body) as answer:
            assert answer.status == 200, await answer.text()
    assert len(json.dumps(body)) > MIB and loop.longest < 1


COSTLY_BODIES = {
    "bytes that are not UTF-8": b"\xff" * 300_000,
    "texts with bytes that are not UTF-8": b'{"a":"' + b"\xc0a" * 300_000 + b'"}',
    "halves of characters": b'{"a":"' + b"\\ud800" * 9_000 + b'", x',
    "zeros": bytes(8 * MIB - 1),
    "an unterminated string": b'{"a":"' + b"x\\n" * (2 * MIB),
    "only escapes": b'{"a":"' + b"\\\\" * (2 * MIB) + b'\xff"}',
    "names": b'{"model":"x","messages":[' + b'{"Role":"a"},' * (MOST_CONTAINERS - 9) + b"{}]}",
    "zeros, packed": gzip.compress(bytes(64 * MIB)),
    "zeros, each packed": gzip.compress(bytes(9)) * 50_000,
    "a byte in each chunk": b"1\r\nx\r\n" * 100_000 + b"0\r\n\r\n",
}


@pytest.mark.parametrize("name", COSTLY_BODIES)
@pytest.mark.parametrize("path", ["/api/show", "/api/nothing"])
async def test_no_body_blocks_other_requests(serve: Serve, http: ClientSession, name: str, path: str) -> None:
    url = await serve(parts())
    headers = {"Content-Length": str(len(COSTLY_BODIES[name]))}
    if "packed" in name:
        headers["Content-Encoding"] = "gzip"
    if "chunk" in name:
        headers = {"Transfer-Encoding": "chunked"}
    head = "".join(f"{key}: {value}\r\n" for key, value in headers.items())
    async with watched() as loop:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        writer.write(f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{head}\r\n".encode() + COSTLY_BODIES[name])
        async with asyncio.timeout(30):
            assert (await reader.readline()).split()[1] in (b"400", b"404", b"413")
        async with http.get(url + "/api/version") as answer:
            assert answer.status == 200
        writer.close()
    assert loop.longest < 0.05


def zstd_bodies(compress: Callable[[bytes], bytes]) -> dict[str, tuple[bytes, int]]:
    """Bodies compressed with zstd, and the statuses of the responses."""
    raw = b'{"model":"none"}'
    return {
        "one frame": (compress(raw), 404),
        "two frames": (compress(raw[:5]) + compress(raw[5:]), 404),
        "a long one": (compress(raw + b" " * (3 * MIB)), 404),
        "cut off": (compress(raw)[:-4], 400),
        "no frame": (raw, 400),
        "zeros": (compress(bytes(64 * MIB)), 413),
        "many frames": (compress(b" " * 9) * 50_000 + compress(raw), 404),
        # A frame with a window of 1 GiB: magic number, descriptor, window, and an empty block.
        "a large window": (bytes.fromhex("28b52ffd00a0010000"), 400),
    }


async def test_zstd_bodies(serve: Serve, http: ClientSession) -> None:
    zstd = pytest.importorskip("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
    url = await serve(parts())
    for name, (body, status) in zstd_bodies(zstd.compress).items():
        async with (
            watched() as loop,
            http.post(f"{url}/api/show", data=body, headers={"Content-Encoding": "zstd"}) as answer,
        ):
            assert answer.status == status, (name, await answer.text())
        assert loop.longest < 0.05, name


@pytest.mark.parametrize(
    ("path", "most"), [("/api/show", 8), ("/tokenize", 8), ("/v1/embeddings", 24), ("/v1/api/show", 8)]
)
async def test_limits_by_route(serve: Serve, http: ClientSession, path: str, most: int) -> None:
    url = await serve(parts())
    body = b'{"model":"none","input":"' + b"x" * (most * MIB) + b'"}'
    async with http.post(url + path, data=body) as answer:
        assert answer.status == 413 and f"{most * MIB} bytes" in await answer.text()
    async with http.post(url + path, data=body[: len(body) // 2] + b'"}') as answer:
        assert answer.status in (400, 404)


async def test_the_memory_budget_counts_decoded_sizes(serve: Serve, http: ClientSession) -> None:
    service = ScriptedService(chunk(finish="stop"))
    service.gate = asyncio.Event()
    url = await serve(parts(service), bodies=MIB)
    body = json.dumps({"model": "demo", "messages": [{"role": "user", "content": "x"}] * 4000})
    assert len(body) < MIB / 2

    async def ask() -> int:
        async with http.post(url + "/api/chat", data=body) as answer:
            return answer.status

    asking = asyncio.create_task(ask())
    try:
        await until(lambda: service.asks)
        assert await ask() == 503, "two bodies exceed the budget"
    finally:
        service.gate.set()
        await asking


async def test_tokenize_with_pieces_limits_the_length(serve: Serve, http: ClientSession) -> None:
    service = ScriptedService(b'{"tokens":[]}')
    url = await serve(parts(service))
    for content in ("x" * (600 << 10), ["x" * (300 << 10), 5, "x" * (300 << 10)]):
        for pieces, status in ((True, 413), (False, 200)):
            body = {"model": "demo", "content": content, "with_pieces": pieces}
            async with http.post(url + "/tokenize", json=body) as answer:
                text = await answer.text()
                assert answer.status == status, text
                assert status == 200 or "with_pieces" in text


@pytest.mark.parametrize(
    ("path", "header", "status"),
    [
        ("/v1/chat/completions", "Content-Length: 999999999", 413),
        ("/v1/chat/completions", "Content-Length: 9\r\nOrigin: http://evil.example", 403),
        ("/v1/chat/completions", "Content-Length: 9\r\nX-Forwarded-For: 192.168.1.8", 401),
    ],
)
async def test_a_refused_client_is_not_asked_for_its_body(
    serve: Serve, path: str, header: str, status: int
) -> None:
    url = await serve(parts(), trusted_proxies=TRUSTED_PROXIES, auth="keys")
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n{header}\r\n\r\n"
    writer.write(head.encode())
    async with asyncio.timeout(5):
        answer = await reader.readuntil(b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    # The body may follow, or another request, and nobody could tell which.
    assert b"connection: close" in answer.lower()
    writer.close()


@pytest.mark.parametrize("expected", ["100-continue", "100-Continue", "the-unexpected"])
async def test_an_accepted_client_is_asked_for_its_body(serve: Serve, expected: str) -> None:
    url = await serve(parts(ScriptedService({"choices": []})))
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
    body = b'{"model":"demo","messages":[{"role":"user","content":"a"}]}'
    for _ in range(2):
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        writer.write(f"{head}Expect: {expected}\r\nContent-Length: {len(body)}\r\n\r\n".encode())
        async with asyncio.timeout(5):
            if expected != "the-unexpected":
                assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(body)
            answer = await reader.readuntil(b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 200 ")
            (length,) = [
                line for line in answer.lower().split(b"\r\n") if line.startswith(b"content-length:")
            ]
            await reader.readexactly(int(length.split()[1]))
    writer.close()


async def test_announced_lengths_reserve_no_memory(serve: Serve, http: ClientSession) -> None:
    url = await serve(parts(ScriptedService(chunk(finish="stop"))), bodies=MIB)
    head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000000\r\n"
    async with contextlib.AsyncExitStack() as held:
        for _ in range(20):
            reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
            held.callback(writer.close)
            writer.write(head + b"Expect: 100-continue\r\n\r\n")
            async with asyncio.timeout(5):
                assert b" 100 " in await reader.readuntil(b"\r\n\r\n")
            writer.write(b"{")
        body = {"model": "demo", "messages": [{"role": "user", "content": "x"}]}
        for _ in range(5):
            async with http.post(url + "/api/chat", json=body) as answer:
                assert answer.status == 200


async def test_one_client_can_not_use_the_whole_budget(serve: Serve, http: ClientSession) -> None:
    service = ScriptedService(chunk(finish="stop"))
    service.gate = asyncio.Event()
    url = await serve(parts(service), bodies=MIB, trusted_proxies=TRUSTED_PROXIES)
    body = {"model": "demo", "messages": [{"role": "user", "content": "x" * (300 << 10)}]}

    async def ask(address: str) -> int:
        async with http.post(url + "/api/chat", json=body, headers={"X-Forwarded-For": address}) as answer:
            return answer.status

    asking = [asyncio.create_task(ask("192.168.1.8"))]
    await until(lambda: len(service.asks) == 1)
    assert await ask("192.168.1.8") == 503
    asking.append(asyncio.create_task(ask("192.168.1.9")))
    await until(lambda: len(service.asks) == 2)
    service.gate.set()
    assert await asyncio.gather(*asking) == [200, 200]
    assert await ask("192.168.1.8") == 200, "its share is released"
