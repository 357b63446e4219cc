"""The HTTP application: routes, error formats, methods, CORS, request ids, metrics, OpenAPI."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import zlib
from typing import Any

import msgspec
import pytest
from aiohttp import ClientSession

from sollold.api.http.application import Listener, build_app
from sollold.errors import Fault, Refusal
from sollold.settings.schema import HttpSettings
from tests.api.api_parts import (
    CHAT,
    ScriptedService,
    call_of,
    chunk,
    parts,
)
from tests.api.conftest import Serve


async def test_root_answers_as_ollama_does(serve: Serve, http: ClientSession) -> None:
    url = await serve(parts())
    async with http.get(url) as answer:
        assert await answer.text() == "Ollama is running"
    async with http.head(url) as answer:
        assert answer.status == 200


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/api/chat", b"{", 400, "not JSON"),
        ("/api/chat", b"", 400, "missing request body"),
        ("/api/chat", b"[1]", 400, "an array"),
        ("/api/chat", b"[" * 100_000, 400, "JSON"),
        ("/api/chat", b'{"model":"demo","messages":"x"}', 400, "messages"),
        ("/api/chat", b'{"model":"none","messages":[]}', 404, "model 'none' not found"),
        ("/api/chat", b"{}", 400, "model is required"),
        ("/api/chat", b'{"model":"demo","messages":[{"role":"user"}],"think":true}', 400, "thinking"),
        (
            "/api/chat",
            b'{"model":"demo","messages":[{"role":"user"}],"options":{"num_ctx":"x"}}',
            400,
            "num_ctx",
        ),
        ("/api/generate", b'{"model":"demo","prompt":"x","format":3}', 400, "format"),
        ("/api/generate", b'{"model":"demo","prompt":"x","keep_alive":"5 parsecs"}', 400, "keep_alive"),
        ("/api/show", b'{"model":"none"}', 404, "not found"),
        ("/api/copy", b'{"source":"demo"}', 400, "destination is required"),
        ("/api/copy", b'{"destination":"demo"}', 400, "source is required"),
        (
            "/v1/chat/completions",
            b'{"model":"none","messages":[{"role":"user","content":"x"}]}',
            404,
            "not found",
        ),
        ("/v1/chat/completions", b'{"model":"demo"}', 400, "messages"),
        ("/v1/chat/completions", b"nonsense", 400, "not JSON"),
        ("/v1/embeddings", b'{"model":"demo","input":{}}', 400, "input"),
        ("/v1/embeddings", b'{"model":"demo","input":["a",1]}', 400, "input must not mix strings"),
        (
            "/v1/chat/completions",
            b'{"model":"demo","messages":[{"role":"assistant","content":[{"type":"text","text":5}]}]}',
            400,
            "needs a text",
        ),
        ("/v1/responses", b'{"model":"demo","input":[{"type":"reasoning","content":5}]}', 400, "parts"),
    ],
)
async def test_errors_have_the_form_of_the_dialect(
    serve: Serve, http: ClientSession, path: str, body: bytes, status: int, message: str
) -> None:
    url = await serve(parts())
    async with http.post(url + path, data=body) as answer:
        assert answer.status == status
        error = (await answer.json())["error"]
    if path.startswith("/v1"):
        assert set(error) == {"message", "type", "param", "code"}
        error = error["message"]
    assert message in error


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        (rb"cut \ud83d", "cut \ufffd"),
        (rb"cut \ud83d here", "cut \ufffd here"),
        (rb"\ude00 \ud83d\ude00 \ud83d\u0041", "\ufffd \U0001f600 \ufffdA"),
        (rb"\ud83d\ud83d\ude00", "\ufffd\U0001f600"),
        (rb"\\ud83d \\\ud83d", "\\ud83d \\\ufffd"),
    ],
)
async def test_lone_surrogates_are_replaced_as_in_ollama(
    serve: Serve, http: ClientSession, sent: bytes, read: str
) -> None:
    service = ScriptedService(chunk(finish="stop"))
    url = await serve(parts(service))
    body = b'{"model":"demo","messages":[{"role":"user","content":"' + sent + b'"}]}'
    async with http.post(f"{url}/api/chat", data=body) as answer:
        assert answer.status == 200
    assert call_of(service).body["messages"][0]["content"] == read


async def test_a_body_that_does_not_decompress_is_a_bad_request(
    serve: Serve, http: ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    url = await serve(parts())
    raw, headers = msgspec.json.encode(CHAT), {"Content-Encoding": "gzip"}
    async with http.post(f"{url}/v1/chat/completions", data=raw, headers=headers) as answer:
        assert answer.status == 400
        assert "can't be read" in (await answer.json())["error"]["message"]
    # A further request on another connection: by then any traceback of the first is logged.
    async with http.get(f"{url}/api/version") as answer:
        assert answer.status == 200
    assert not [line for line in caplog.records if line.exc_info]


@pytest.mark.parametrize("tools", [[1], [{"type": "function"}], "x", [{"type": "custom", "name": "x"}]])
async def test_apply_template_checks_tools(serve: Serve, http: ClientSession, tools: object) -> None:
    url = await serve(parts())
    body = {"model": "demo", "messages": [{"role": "user", "content": "x"}], "tools": tools}
    async with http.post(f"{url}/apply-template", json=body) as answer:
        assert answer.status == 400 and "tools" in (await answer.json())["error"]["message"]


async def test_compressed_bodies(serve: Serve, http: ClientSession) -> None:
    service = ScriptedService(chunk(finish="stop"))
    url = await serve(parts(service))
    raw = msgspec.json.encode(CHAT)
    bare = zlib.compressobj(wbits=-15)
    for encoding, data, status in (
        ("gzip", gzip.compress(raw), 200),
        ("X-GZIP", gzip.compress(raw[:9]) + gzip.compress(raw[9:]), 200),
        ("deflate", zlib.compress(raw), 200),
        ("deflate", bare.compress(raw) + bare.flush(), 200),
        ("identity", raw, 200),
        *(
            ("gzip", gzip.compress(raw + b" " * more), 200)
            for more in range(256 * 1024 - 300, 256 * 1024, 60)
        ),
        ("gzip", gzip.compress(raw)[:-9], 400),
        ("deflate", raw, 400),
        ("gzip, gzip", gzip.compress(gzip.compress(raw)), 415),
        ("br", raw, 415),
    ):
        headers = {"Content-Encoding": encoding, "Content-Type": "application/json"}
        async with http.post(f"{url}/api/chat", data=data, headers=headers) as answer:
            assert answer.status == status, (encoding, await answer.text())


@pytest.mark.parametrize(
    "header", ["Host", "Origin", "Authorization", "X-Api-Key", "X-Request-Id", "User-Agent"]
)
async def test_headers_that_are_not_utf8_raise_no_exception(
    serve: Serve, header: str, caplog: pytest.LogCaptureFixture
) -> None:
    url = await serve(parts())
    for path in ("/v1/responses/x", "/api/tags", "/v1/messages/%ff"):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        value = b"Bearer \xff\xfe" if header == "Authorization" else b"a\xff\xfe"
        head = b"GET %s HTTP/1.1\r\n%s: %s\r\nConnection: close\r\n" % (path.encode(), header.encode(), value)
        writer.write(head + (b"" if header == "Host" else b"Host: localhost\r\n") + b"\r\n")
        answer = await reader.read()
        writer.close()
        assert answer.startswith((b"HTTP/1.1 2", b"HTTP/1.1 4")), answer
        assert b"{" in answer
    assert not [line for line in caplog.records if line.exc_info]


async def test_unknown_routes_and_wrong_methods(serve: Serve, http: ClientSession) -> None:
    url = await serve(parts())
    async with http.get(f"{url}/api/nothing") as answer:
        assert answer.status == 404 and isinstance((await answer.json())["error"], str)
    async with http.get(f"{url}/v1/nothing") as answer:
        assert answer.status == 404 and "message" in (await answer.json())["error"]
    async with http.get(f"{url}/api/chat") as answer:
        assert answer.status == 405 and "POST" in answer.headers["Allow"]
        assert "not allowed" in (await answer.json())["error"]
    async with http.delete(f"{url}/v1/chat/completions") as answer:
        assert answer.status == 405 and "message" in (await answer.json())["error"]


@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/openapi.json", "/v1/models", "/v1/api/tags"])
async def test_head_gives_the_headers_of_get(serve: Serve, http: ClientSession, path: str) -> None:
    url = await serve(parts())
    async with http.head(url + path) as answer, http.get(url + path) as whole:
        assert answer.status == 200 and await answer.read() == b""
        assert answer.headers["Content-Type"] == whole.headers["Content-Type"]


async def test_head_starts_no_stream_of_events(serve: Serve, http: ClientSession) -> None:
    url = await serve(parts())
    async with http.head(f"{url}/api/cluster/events?follow=1") as answer:
        assert answer.status == 405 and answer.headers["Allow"] == "GET"


async def test_requests_from_foreign_origins_are_refused(serve: Serve, http: ClientSession) -> None:
    service = ScriptedService(chunk(finish="stop"))
    url = await serve(parts(service))
    async with http.post(f"{url}/api/chat", json=CHAT, headers={"Origin": "http://evil.example"}) as answer:
        assert answer.status == 403 and "cors_origins" in (await answer.json())["error"]
    for origin in ("http://localhost:3000", url):
        async with http.post(f"{url}/api/chat", json=CHAT, headers={"Origin": origin}) as answer:
            assert answer.status == 200 and answer.headers["Access-Control-Allow-Origin"] == origin
    preflight = {
        "Origin": "http://localhost:3000",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
    }
    async with http.options(f"{url}/api/chat", headers=preflight) as answer:
        assert answer.status == 204 and "POST" in answer.headers["Access-Control-Allow-Methods"]


async def test_request_ids(serve: Serve, http: ClientSession) -> None:
    service = ScriptedService(chunk(finish="stop"))
    url = await serve(parts(service))
    async with http.post(f"{url}/api/chat", json=CHAT, headers={"X-Request-Id": "mine-1"}) as answer:
        assert answer.headers["X-Request-Id"] == "mine-1"
    assert service.asks[-1].id.startswith("mine-1.")
    named = {"X-Request-Id": "mine-2", "anthropic-version": "2023-06-01"}
    async with http.post(f"{url}/v1/messages", json={**CHAT, "max_tokens": 5}, headers=named) as answer:
        assert answer.headers["request-id"] == "mine-2"
    failing = (chunk("a"), Refusal(Fault.INTERRUPTED, "the engine died"))
    tries: list[tuple[dict[str, Any], tuple[Any, ...]]] = [
        ({"messages": []}, ()),
        ({"stream": True}, failing),
    ]
    for body, events in tries:
        service.events = events
        asked = {**CHAT, "max_tokens": 5, **body}
        async with http.post(f"{url}/v1/messages", json=asked, headers=named) as answer:
            text = await answer.text()
            assert '"type":"error"' in text and '"request_id":"mine-2"' in text
    async with http.get(f"{url}/api/version", headers={"X-Request-Id": "not sane"}) as answer:
        assert "request-id" not in answer.headers
        assert answer.headers["X-Request-Id"] != "not sane"


async def test_priority_client_and_context_reach_the_service(serve: Serve, http: ClientSession) -> None:
    service = ScriptedService(chunk(finish="stop"))
    url = await serve(parts(service))
    body = {**CHAT, "options": {"num_ctx": 4096}}
    async with http.post(f"{url}/api/chat", json=body, headers={"X-Sollold-Priority": "URGENT"}) as answer:
        assert answer.status == 200
    assert (service.asks[-1].priority, service.asks[-1].context) == (9, 4096)
    assert service.asks[-1].client == "127.0.0.1"
    async with http.post(
        f"{url}/v1/chat/completions", json={**CHAT, "priority": 2}, headers={"Authorization": "Bearer sk-a"}
    ) as answer:
        assert answer.status == 200
    assert service.asks[-1].priority == 2 and service.asks[-1].client == "127.0.0.1", (
        "an unknown key does not identify a client"
    )
    assert "priority" not in call_of(service).body
    async with http.post(f"{url}/api/chat", json=CHAT, headers={"X-Sollold-Role": "researcher"}) as answer:
        assert answer.status == 200
    assert service.asks[-1].priority == 8
    async with http.post(f"{url}/api/chat", json=CHAT, headers={"X-Sollold-Priority": "11"}) as answer:
        assert answer.status == 400


async def test_browsers_get_the_dashboard(serve: Serve, http: ClientSession) -> None:
    url = await serve(parts())
    async with http.get(url, headers={"Accept": "text/html,*/*"}) as answer:
        page = await answer.text()
        assert answer.content_type == "text/html" and "sollold" in page
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert "http://" not in page and "https://" not in page
    for name in ("dashboard.css", "dashboard.js"):
        assert f'"web/{name}"' in page  # Relative, to work below a proxy's path.
        async with http.get(f"{url}/web/{name}") as answer:
            assert answer.status == 200 and len(await answer.text()) > 1000
    async with http.get(f"{url}/web/..%2fapp.py") as answer:
        assert answer.status == 404


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 beside IPv4 here")
async def test_listening_on_all_addresses_includes_ipv4_and_ipv6(http: ClientSession) -> None:
    facts = HttpSettings(host="::", port=0)
    listener = Listener(build_app(parts(), facts), facts, drain=0.2)
    await listener.start()
    try:
        for host in ("127.0.0.1", "[::1]"):
            async with http.get(f"http://{host}:{listener.port}/") as answer:
                assert answer.status == 200
    finally:
        await listener.close()


async def test_metrics(serve: Serve, http: ClientSession) -> None:
    url = await serve(parts(ScriptedService(chunk(finish="stop"))))
    async with http.post(f"{url}/api/chat", json=CHAT) as answer:
        await answer.read()
    async with http.post(f"{url}/v1/chat/completions", json={}) as answer:
        assert answer.status == 400
    async with http.get(f"{url}/metrics") as answer:
        text = await answer.text()
    assert 'sollold_http_requests_total{dialect="ollama",route="/api/chat",status="200"} 1.0' in text
    assert (
        'sollold_http_requests_total{dialect="openai",route="/v1/chat/completions",status="400"} 1.0' in text
    )
    assert 'sollold_device_memory_granted_bytes{device="CPU",kind="cpu"} 100.0' in text
    assert "sollold_endpoint_ready" in text


async def test_every_route_is_described(serve: Serve, http: ClientSession) -> None:
    url = await serve(parts())
    async with http.get(f"{url}/openapi.json") as answer:
        described = await answer.json()
    paths = described["paths"]
    for path in ("/api/chat", "/v1/chat/completions", "/v1/messages", "/api/cluster", "/v1/models/{model}"):
        assert path in paths
    names = set(described["components"]["schemas"])
    text = json.dumps(paths)
    assert (
        all(f'"#/components/schemas/{name}"' in text for name in ("Chat", "Messages"))
        and "Error_openai" in names
    )
