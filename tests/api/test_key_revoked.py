"""Requests whose API key is revoked or expires while they run: they end with the reason."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from aiohttp import ClientPayloadError, ClientSession
from openai.types.chat import ChatCompletionMessageParam

from sollold.api.cluster import monitor_routes
from sollold.api.http import key_watch
from sollold.control.keys import Keys, Scope
from sollold.control.member_pass import MemberPasses
from tests.api.api_parts import CHAT, REMOTE, TRUSTED_PROXIES, ScriptedService, chunk, parts
from tests.api.conftest import Serve
from tests.doubles import FakeView, record, until
from tests.models.fakes import FakeCalls, FakeServer

USER: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]


class Clock:
    """A wall clock set by the test."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def keys(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Keys]:
    monkeypatch.setattr(key_watch, "CHECK_SECONDS", 0.02)
    store = Keys(FakeView(record("0" * 16)), FakeCalls("0" * 16, {}), tmp_path / "keys.json", clock)
    await store.start()
    yield store
    await store.close()


STREAMS: list[tuple[str, dict[str, Any]]] = [
    ("/api/chat", CHAT),
    ("/api/generate", {"model": "demo", "prompt": "hi"}),
    ("/v1/chat/completions", {**CHAT, "stream": True}),
    ("/v1/responses", {"model": "demo", "input": "hi", "stream": True}),
    ("/v1/messages", {**CHAT, "max_tokens": 9, "stream": True}),
]


@pytest.mark.parametrize(("path", "body"), STREAMS)
async def test_a_stream_ends_when_its_key_is_revoked(
    serve: Serve, http: ClientSession, keys: Keys, path: str, body: dict[str, Any]
) -> None:
    service = ScriptedService(chunk("a"), asyncio.Event())
    url = await serve(parts(service, keys=keys), trusted_proxies=TRUSTED_PROXIES)
    _, secret = await keys.create("laptop", Scope.INFER)
    async with http.post(url + path, json=body, headers=REMOTE | {"X-Api-Key": secret}) as answer:
        assert answer.status == 200
        await answer.content.readany()
        await keys.revoke("laptop")
        rest = await answer.text()
    assert "revoked" in rest and "[DONE]" not in rest
    last = rest.strip().split("\n")[-1].removeprefix("data: ")
    assert "revoked" in str(json.loads(last)["error"])
    await until(lambda: service.closed == 1)


async def test_a_request_ends_when_its_key_expires(
    serve: Serve, http: ClientSession, keys: Keys, clock: Clock
) -> None:
    url = await serve(parts(ScriptedService(asyncio.Event()), keys=keys), trusted_proxies=TRUSTED_PROXIES)
    _, secret = await keys.create("guest", Scope.INFER, expires=60.0)
    headers = REMOTE | {"Authorization": f"Bearer {secret}"}
    request = asyncio.create_task(
        http.post(url + "/api/chat", json=CHAT | {"stream": False}, headers=headers)
    )
    await asyncio.sleep(0.1)
    assert not request.done(), "a valid key ends nothing"
    clock.now += 61.0
    async with await request as answer:
        assert answer.status == 401 and "expired" in (await answer.json())["error"]
        assert answer.headers["WWW-Authenticate"] == "Bearer"


async def test_openais_client_raises_when_its_key_is_revoked(serve: Serve, keys: Keys) -> None:
    url = await serve(
        parts(ScriptedService(chunk("a"), asyncio.Event()), keys=keys), trusted_proxies=TRUSTED_PROXIES
    )
    _, secret = await keys.create("laptop", Scope.INFER)
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key=secret, max_retries=0, default_headers=REMOTE
    ) as client:
        stream = await client.chat.completions.create(model="demo", messages=USER, stream=True)
        with pytest.raises(openai.APIError, match="revoked"):
            async for _ in stream:
                await keys.revoke("laptop") if keys.all()[0].revoked == 0 else None


async def test_a_pull_and_the_event_stream_end_when_their_key_is_revoked(
    serve: Serve, http: ClientSession, keys: Keys
) -> None:
    class Puller:
        async def pull(self, name: str, *, insecure: bool = False) -> AsyncIterator[dict[str, Any]]:
            yield {"status": "pulling manifest"}
            await asyncio.Event().wait()

    url = await serve(parts(keys=keys, puller=Puller()), trusted_proxies=TRUSTED_PROXIES)
    _, secret = await keys.create("laptop", Scope.MODELS)
    headers = REMOTE | {"X-Api-Key": secret}
    async with (
        http.post(url + "/api/pull", json={"model": "demo"}, headers=headers) as pulled,
        http.get(url + "/api/cluster/events?follow=1", headers=headers) as events,
    ):
        assert json.loads(await pulled.content.readline()) == {"status": "pulling manifest"}
        await events.content.readline()
        await keys.revoke("laptop")
        assert "revoked" in json.loads(await pulled.content.readline())["error"]
        with contextlib.suppress(ClientPayloadError):
            async with asyncio.timeout(5):
                while await events.content.readany():
                    pass


async def test_local_requests_continue_after_their_key_is_revoked(
    serve: Serve, http: ClientSession, keys: Keys
) -> None:
    gate = asyncio.Event()
    url = await serve(parts(ScriptedService(chunk("a"), gate, chunk(finish="stop")), keys=keys))
    _, secret = await keys.create("laptop", Scope.INFER)
    async with http.post(url + "/api/chat", json=CHAT, headers={"X-Api-Key": secret}) as answer:
        await answer.content.readline()
        await keys.revoke("laptop")
        await asyncio.sleep(0.1)
        gate.set()
        assert json.loads((await answer.text()).strip().split("\n")[-1])["done"] is True


@pytest.mark.parametrize("member", [False, True])
async def test_a_follower_without_a_key_is_disconnected_when_keys_become_required(
    serve: Serve, http: ClientSession, keys: Keys, monkeypatch: pytest.MonkeyPatch, member: bool
) -> None:
    monkeypatch.setattr(monitor_routes, "_PING_SECONDS", 0.02)
    me, other = record("0" * 16), record("1" * 16)
    view = FakeView(me)
    view.others = {other.node: other}
    server = FakeServer()
    member_passes = MemberPasses(FakeView(other, view.world), FakeCalls(other.node, {}), str)
    member_passes.register(server)
    passes = MemberPasses(view, FakeCalls(me.node, {other.node: server}), str)
    url = await serve(parts(keys=keys, passes=passes), trusted_proxies=TRUSTED_PROXIES)
    credentials = {"Authorization": f"Bearer {await member_passes.issue('127.0.0.1')}"} if member else {}
    async with (
        http.get(url + "/api/cluster/events?follow=1", headers=REMOTE | credentials) as answer,
        http.get(url + "/api/cluster/events?follow=1") as local,
        asyncio.timeout(10),
    ):
        await answer.content.readline()
        await keys.create("first", Scope.INFER)
        if member:
            for _ in range(8):
                await answer.content.readline()  # keys don't matter to a member
            view.others = {}
        while await answer.content.readline():
            continue
        await local.content.readline()
        assert not local.content.at_eof()
