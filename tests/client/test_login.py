"""A login in the URL for a proxy before the node: it is sent there and not disclosed elsewhere."""

from __future__ import annotations

import asyncio
import base64
import logging
import socket
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from sollold.api.http.secure_server import secure_server
from sollold.api.http.server_tls import ClusterCertificate, ServerTls
from sollold.client import ClientError, HybridRouter, OllamaPool, sync_wrapper
from sollold.client.blocking import BlockingClient
from sollold.client.http import Client
from sollold.cluster.net.certificate_authority import Subject, authority_pem
from sollold.cluster.net.identity import Identity, Tokens
from tests.http_double import HttpDouble
from tests.keys import key

KEY = "sk-sollold-abc"
LOGIN = "Basic " + base64.b64encode("anna:ge:heim/ß".encode()).decode()
SECRET = b"s" * 32
HELLO = [{"role": "user", "content": "hi"}]


class Proxy(HttpDouble):
    """A proxy that requires a login, with a node behind it that requires a key for models."""

    async def start(self) -> str:
        app = web.Application()
        app.router.add_route("*", "/llm/{path:.*}", self._answer)
        return await self.serve(app)

    async def _answer(self, request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != LOGIN:
            return web.Response(status=401, text="<html>Login</html>")
        if request.path == "/llm/api/chat":
            if request.headers.get("X-Api-Key") != KEY:
                return web.json_response({"error": "an API key is needed"}, status=401)
            return web.json_response({"message": {"role": "assistant", "content": "hi"}, "done": True})
        return web.json_response({"name": "a", "models": [], "nodes": [], "deployments": []})


@pytest.fixture
async def host() -> AsyncIterator[str]:
    proxy = Proxy()
    yield (await proxy.start()).removeprefix("http://") + "/llm"
    await proxy.close()


async def test_a_login_and_an_api_key_are_sent(host: str) -> None:
    url = f"http://anna:ge%3Aheim%2F%C3%9F@{host}/"
    async with HybridRouter(node=url, api_key=KEY) as router:
        assert (await router.route_request("demo", HELLO))["message"]["content"] == "hi"
    async with OllamaPool(url) as pool, Client(url) as client:
        assert await pool.list() == [] == (await client.get("/api/tags"))["models"]
    blocking = BlockingClient(url, key=KEY)
    assert (await asyncio.to_thread(blocking.post, "/api/chat", {}))["done"] is True


async def test_a_login_given_later_is_sent(host: str) -> None:
    """A login reported by another node is ignored."""
    url = f"http://anna:ge%3Aheim%2F%C3%9F@{host}"
    async with OllamaPool(f"http://{host}") as pool:
        async with HybridRouter(pool, node=url):
            assert await pool.list() == []
        reported = {"nodes": [{"node": "n", "name": "n", "url": f"http://eve:eve@{host}"}]}
        pool.client.nodes.learn("http://10.0.0.2:11435", reported)
        assert await pool.list() == [] and len(pool.client.nodes) == 1


async def test_a_missing_login_is_explained(host: str) -> None:
    message = f"a proxy at http://{host} asks for a login; it is given in the URL"
    async with OllamaPool(f"http://{host}") as pool:
        with pytest.raises(ClientError, match=message):
            await pool.list()
    with pytest.raises(ClientError, match=message):
        await asyncio.to_thread(BlockingClient(f"http://{host}").get, "/api/tags")


async def test_the_login_appears_in_no_message(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "sollold.client")
    url = "http://anna:geheim@127.0.0.1:9/llm"
    router = HybridRouter(node=url)
    texts = [
        repr(client) for client in (router, sync_wrapper.OllamaPool(url), Client(url), BlockingClient(url))
    ]
    with pytest.raises(ClientError) as lost:
        await router.route_request("demo", HELLO)
    with pytest.raises(ClientError) as typed:
        await asyncio.to_thread(BlockingClient(url).get, "/api/tags")
    texts += [str(lost.value), str(typed.value), caplog.text]
    for wrong in ("ftp://anna:geheim@host", "http://anna:geheim@host:99999"):
        with pytest.raises(ValueError, match="not a node's URL") as refused:
            Client(wrong)
        with pytest.raises(ClientError, match="invalid URL") as invalid:
            BlockingClient(wrong)
        texts += [str(refused.value), str(invalid.value)]
    assert all("127.0.0.1:9/llm" in text or "host" in text for text in texts)
    assert not any("geheim" in text for text in texts)
    await router.close()


async def test_an_expired_key_is_renewed_and_never_sent_without_tls() -> None:
    valid, clear = ["key-1"], []

    async def handle(request: web.Request) -> web.Response:
        if not request.secure:
            clear.append(request.headers.get("Authorization"))
        if request.headers.get("Authorization") != f"Bearer {valid[-1]}":
            return web.json_response({"error": "a key is needed"}, status=401)
        return web.json_response({"ok": True})

    app = web.Application()
    app.router.add_post("/", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    assert runner.server is not None
    tls = ServerTls(
        ClusterCertificate(Identity(key(1), Tokens((SECRET,))), lambda: Subject((), ("127.0.0.1",)))
    )
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setblocking(False)
    server = secure_server([listening], runner.server, tls.context_now, required=False)
    # The certificate has the address only.
    url = f"http://localhost:{listening.getsockname()[1]}"
    try:
        client = BlockingClient(url, credentials=lambda: (valid[-1], authority_pem(SECRET)))
        for name in ("key-1", "key-2", "key-3"):
            valid.append(name)
            assert await asyncio.to_thread(client.post, "/", {}) == {"ok": True}
        assert clear == [None]
        issued: list[str] = []

        def issue() -> tuple[str, str]:
            issued.append("wrong")
            return "wrong", authority_pem(SECRET)

        client = BlockingClient(url, credentials=issue)
        with pytest.raises(ClientError, match="a key is needed"):
            await asyncio.to_thread(client.post, "/", {})
        assert len(issued) == 1
        client = BlockingClient(url, credentials=lambda: (valid[-1], authority_pem(b"other" * 8)))
        with pytest.raises(ClientError, match="is not trusted"):
            await asyncio.to_thread(client.post, "/", {})
    finally:
        await server.close()
        await runner.cleanup()


async def test_a_key_is_not_sent_where_there_is_no_tls() -> None:
    clear: list[str | None] = []

    async def handle(request: web.Request) -> web.Response:
        clear.append(request.headers.get("Authorization"))
        return web.json_response({"error": "a key is needed"}, status=401)

    app = web.Application()
    app.router.add_post("/", handle)
    double = HttpDouble()
    client = BlockingClient(await double.serve(app), credentials=lambda: ("key-1", authority_pem(SECRET)))
    with pytest.raises(ClientError, match="offers no TLS"):
        await asyncio.to_thread(client.post, "/", {})
    await double.close()
    assert clear == [None]
