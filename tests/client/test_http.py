"""The client of a node's HTTP API: timeouts, lost connections, absent nodes."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web

from sollold.client import OllamaPool, RequestTimeout
from sollold.client.blocking import BlockingClient
from sollold.client.errors import ClientError, NodeLost
from sollold.client.http import Client
from tests.http_double import HttpDouble


async def test_a_node_that_reports_a_timeout_is_not_lost(caplog: pytest.LogCaptureFixture) -> None:
    paths = []

    async def answer(request: web.Request) -> web.StreamResponse:
        paths.append(request.path)
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        await response.write(b'{"error": "not complete within the deadline", "code": 504}\n')
        return response

    app = web.Application()
    app.router.add_post("/api/chat", answer)
    node = HttpDouble()
    url = await node.serve(app)
    try:
        async with OllamaPool(url) as pool:
            with pytest.raises(RequestTimeout, match=r"^not complete within the deadline$"):
                await pool.chat("m", [{"role": "user", "content": "hi"}], timeout=30)
    finally:
        await node.close()
    assert paths == ["/api/chat"] and "lost" not in caplog.text


async def test_a_redirect_is_refused_with_the_address_to_use() -> None:
    """Followed, a POST would become a GET, as if the node had no such path."""

    async def redirect(request: web.Request) -> web.StreamResponse:
        raise web.HTTPFound("https://pc.example/api/chat")

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", redirect)
    node = HttpDouble()
    url = await node.serve(app)
    try:
        async with Client(url) as client:
            for call in (client.get("/api/version"), client.post("/api/chat", {}), client.delete("/x", {})):
                with pytest.raises(ClientError, match=r"redirects to https://pc\.example/api/chat: "):
                    await call
            with pytest.raises(ClientError, match="redirects to"):
                await anext(client.stream("/api/chat", {}))
    finally:
        await node.close()


async def test_a_connection_closed_by_the_node_is_replaced() -> None:
    """For example when the node restarted while the caller's event loop was busy."""
    connections = []

    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split()[0]))
        writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n{"done": true}')
        await reader.read(1)
        writer.close()

    server = await asyncio.start_server(once, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, Client(url) as client:
        for _ in range(3):
            assert await client.post("/api/chat", {}) == {"done": True}
        assert [record async for record in client.stream("/api/chat", {})] == [{"done": True}]
    assert len(connections) == 4


async def test_a_request_that_may_have_been_processed_is_not_repeated() -> None:
    """The node read it on a new connection before closing it, so it may have processed it."""
    received = []

    async def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.append(await reader.readuntil(b"{}"))
        writer.close()

    server = await asyncio.start_server(close, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, Client(url) as client:
        with pytest.raises(ClientError, match="disconnected"):
            await client.post("/api/chat", {})
    assert len(received) == 1


async def test_a_silent_node_is_not_reported_as_absent() -> None:
    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(listen, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, Client(url, timeout=0.1) as client:
        with pytest.raises(ClientError, match=r"did not answer within 0\.1 s") as slow:
            await client.get("/api/cluster")
        with pytest.raises(ClientError, match=r"did not answer within 0\.1 s"):
            async for _ in client.stream("/api/chat", {}, stall=0.1):
                pass
    assert slow.value.status == 504 and "no daemon" not in slow.value.message
    async with Client(url) as client:
        with pytest.raises(ClientError, match=r"no daemon answers at .* \(Connection refused\)") as nobody:
            await client.get("/api/cluster")
    # Python code passes node=; --node is for the command line.
    assert nobody.value.status == 0 and "node=" in nobody.value.message


@pytest.mark.parametrize("host", ["192.168.1..5", f"{'x' * 70}.lan"])
async def test_a_host_name_that_can_not_be_encoded_is_unreachable(host: str) -> None:
    async with Client(host) as client:
        with pytest.raises(NodeLost, match="no daemon answers"):
            await client.get("/api/version")
    with pytest.raises(ClientError, match="no daemon answers") as failed:
        await asyncio.to_thread(BlockingClient(f"http://{host}:1").get, "/api/version")
    assert failed.value.status == 0


def test_a_host_name_with_a_space_is_invalid() -> None:
    with pytest.raises(ClientError, match="invalid URL"):
        BlockingClient("http://pc 2:11435")
