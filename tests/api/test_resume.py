"""The field ``resume``: a client that lost its node sends what it has received to another."""

from __future__ import annotations

import json
from typing import Any

import pytest
from aiohttp import ClientSession

from sollold.serving.request import Delivered, Engine
from tests.api.api_parts import ScriptedService, call_of, chunk, parts
from tests.api.conftest import Serve

HELLO = [{"role": "user", "content": "hi"}]
RESUME = {"content": "Hel", "thinking": "hm", "events": 3, "spent_ms": 5.0, "backend": "llama.cpp-local"}


@pytest.mark.parametrize("path", ["chat", "generate"])
async def test_resume_reaches_the_service_but_not_the_engine(
    serve: Serve, http: ClientSession, path: str
) -> None:
    service = ScriptedService(chunk("lo"), chunk(finish="stop"))
    url = await serve(parts(service))
    fields: dict[str, Any] = {"messages": HELLO} if path == "chat" else {"prompt": "hi"}
    async with http.post(f"{url}/api/{path}", json={"model": "demo", **fields, "resume": RESUME}) as answer:
        lines = [json.loads(line) async for line in answer.content]
    assert answer.status == 200 and lines[-1]["done"]
    (ask,) = service.asks
    assert ask.delivered == Delivered("Hel", "hm", 3, spent_ms=5.0, engine=Engine.LLAMA)
    assert all("resume" not in call.body for call in ask.calls.values())
    assert call_of(service, Engine.OLLAMA).body == {"model": "demo", **fields}
    if path == "generate":
        # The returned context has the whole answer.
        async with http.post(
            f"{url}/api/generate", json={"model": "demo", "prompt": "and?", "context": lines[-1]["context"]}
        ) as further:
            await further.read()
        sent = call_of(service, Engine.LLAMA).body["messages"]
        assert {"role": "assistant", "content": "Hello"} in sent


@pytest.mark.parametrize(
    ("resume", "stream"), [(RESUME, False), ({"events": -1}, True), ({"content": 1}, True), ("x", True)]
)
async def test_an_invalid_resume_is_a_bad_request(
    serve: Serve, http: ClientSession, resume: Any, stream: bool
) -> None:
    url = await serve(parts(ScriptedService(chunk("a"))))
    body = {"model": "demo", "messages": HELLO, "resume": resume, "stream": stream}
    async with http.post(f"{url}/api/chat", json=body) as answer:
        assert answer.status == 400


async def test_cluster_stats_of_a_new_node(serve: Serve, http: ClientSession) -> None:
    url = await serve(parts(ScriptedService(chunk("a"))))
    async with http.get(f"{url}/api/cluster/stats") as answer:
        stats = await answer.json()
    assert stats["distributed_requests"] == stats["generated_tokens"] == 0
    assert stats["uptime_seconds"] >= 0 and stats["name"]
