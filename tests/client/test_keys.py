"""The API key is sent only to nodes the caller named and to nodes these report."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web

from sollold.client import Client, ClientError, HybridRouter, OllamaPool, sync_wrapper
from sollold.client.blocking import BlockingClient
from sollold.client.cluster import ClusterClient
from sollold.client.node_list import NodeList
from tests.http_double import HttpDouble

SECRET = "sk-sollold-abc"


class Gate(HttpDouble):
    """A node that requires the key and records the keys it receives."""

    def __init__(self) -> None:
        self.shown: list[str | None] = []
        self.others: list[dict[str, Any]] = []

    async def start(self) -> str:
        app = web.Application()
        app.router.add_get("/{path:.*}", self._answer)
        app.router.add_post("/{path:.*}", self._answer)
        return await self.serve(app)

    async def _answer(self, request: web.Request) -> web.Response:
        key = request.headers.get("Authorization")
        self.shown.append(key)
        if key != f"Bearer {SECRET}":
            return web.json_response({"error": "an API key is needed"}, status=401)
        if request.path == "/api/chat":
            return web.json_response({"message": {"role": "assistant", "content": "hi"}, "done": True})
        return web.json_response({"name": "a", "models": [], "nodes": self.others, "deployments": []})


@pytest.fixture
async def gates() -> AsyncIterator[Callable[[], Any]]:
    made: list[Gate] = []

    async def gate() -> tuple[Gate, str]:
        made.append(Gate())
        return made[-1], await made[-1].start()

    yield gate
    for node in made:
        await node.close()


HELLO = [{"role": "user", "content": "hi"}]


async def test_a_key_is_taken_from_the_argument_or_the_environment(
    gates: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, url = await gates()
    async with HybridRouter(node=url, api_key=SECRET) as router:
        assert (await router.route_request("demo", HELLO))["message"]["content"] == "hi"
    async with OllamaPool(url) as pool:
        with pytest.raises(ClientError, match="SOLLOLD_API_KEY") as caught:
            await pool.list()
        assert caught.value.status == 401
    monkeypatch.setenv("SOLLOLD_API_KEY", SECRET + "\n")
    async with OllamaPool(url) as pool, Client(url) as client:
        assert await pool.list() == []
        assert (await client.get("/api/tags"))["models"] == []
    async with HybridRouter(OllamaPool(url), api_key="other") as router:
        with pytest.raises(ClientError, match="an API key is needed"):
            await router.route_request("demo", HELLO)


async def test_the_blocking_client_takes_a_key(gates: Callable[[], Any]) -> None:
    _, url = await gates()

    def ask() -> None:
        with sync_wrapper.OllamaPool(url, api_key=SECRET) as pool:
            assert pool.list() == []
        with sync_wrapper.HybridRouter(node=url, api_key=SECRET) as router:
            assert router.coordinators == []
        with pytest.raises(ClientError, match=r"an API key is needed.*\$SOLLOLD_API_KEY$"):
            BlockingClient(url).get("/api/tags")

    await asyncio.to_thread(ask)


async def test_a_node_known_only_by_mdns_gets_no_key(gates: Callable[[], Any]) -> None:
    named, url = await gates()
    found, other = await gates()

    async def on_the_lan() -> list[str]:
        return [other]

    client = ClusterClient(find=on_the_lan, api_key=SECRET)
    client.nodes.add([other], trusted=False)
    with pytest.raises(ClientError, match="an API key is needed"):
        await client.get("/api/tags")
    assert set(found.shown) == {None}
    await client.close()
    # The named node reports it as a member.
    named.others = [{"node": "b" * 16, "name": "b", "url": other}]
    client = ClusterClient([url], api_key=SECRET)
    client.nodes.add([other], trusted=False)
    await client.learn()
    assert all(known.trusted for known in client.nodes)
    await named.close()
    assert (await client.get("/api/tags"))["models"] == []
    apart = client.apart()
    assert (await apart.get("/api/tags"))["models"] == []
    await apart.close()
    await client.close()


def test_nodes_learned_over_https_are_used_only_with_https() -> None:
    nodes = NodeList(["https://pc1:11435"])
    reported = [
        {"node": "a", "url": "http://10.0.0.1:11435", "me": True},
        {"node": "b", "url": "http://10.0.0.2:1"},
    ]
    nodes.learn("https://pc1:11435", {"nodes": [*reported, {"node": "c", "url": "https://10.0.0.3:1"}]})
    assert [known.url for known in nodes] == ["https://pc1:11435", "https://10.0.0.3:1"]
