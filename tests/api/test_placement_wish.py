"""The field ``placement``: read in each dialect, not sent to engines, refused if invalid."""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp import ClientSession

from sollold.leader.wish import PlacementWish
from sollold.machine.external_worker import ExternalState, ExternalWorker
from sollold.serving.request import Engine
from tests.api.api_parts import PlainCluster, ScriptedService, chunk, parts, record, usage_chunk
from tests.api.conftest import Serve

WISH = {"workers": 2, "distributed": True, "threshold": 0.5, "policy": "even", "external": []}
WISH |= {"speculation": " NGram"}
PARSED_WISH = PlacementWish(2, True, 0.5, "even", (), "ngram")
MESSAGES = [{"role": "user", "content": "hi"}]
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("/api/chat", {"messages": MESSAGES}),
    ("/api/generate", {"prompt": "hi"}),
    ("/v1/chat/completions", {"messages": MESSAGES}),
    ("/v1/completions", {"prompt": "hi"}),
    ("/v1/responses", {"input": "hi"}),
    ("/v1/messages", {"messages": MESSAGES, "max_tokens": 5}),
]


@pytest.mark.parametrize(("path", "body"), REQUESTS, ids=[path for path, _ in REQUESTS])
async def test_placement_reaches_the_service_but_not_the_engine(
    serve: Serve, http: ClientSession, path: str, body: dict[str, Any]
) -> None:
    service = ScriptedService(chunk("hello"), chunk(finish="stop"), usage_chunk())
    url = await serve(parts(service))
    async with http.post(url + path, json={"model": "demo", "placement": WISH, **body}) as answer:
        assert answer.status == 200, await answer.text()
    (ask,) = service.asks
    assert ask.placement == PARSED_WISH
    assert "placement" not in ask.calls[Engine.LLAMA].body
    async with http.post(url + path, json={"model": "demo", **body}):
        assert service.asks[-1].placement == PlacementWish()


@pytest.mark.parametrize(
    "wrong", [{"worker": 1}, {"workers": -1}, {"policy": "odd"}, {"threshold": "many"}, 7]
)
@pytest.mark.parametrize("path", [*(path for path, _ in REQUESTS), "/api/cluster/load"])
async def test_an_invalid_placement_is_refused(
    serve: Serve, http: ClientSession, path: str, wrong: object
) -> None:
    service = ScriptedService()
    url = await serve(parts(service))
    body = {"model": "demo", "placement": wrong, **dict(REQUESTS).get(path, {})}
    async with http.post(url + path, json=body) as answer:
        assert answer.status == 400
        assert "placement" in await answer.text()
    assert service.asks == []


async def test_placement_reaches_loads_and_plans(serve: Serve, http: ClientSession) -> None:
    cluster = PlainCluster()
    url = await serve(parts(cluster=cluster))
    for path in ("/api/cluster/plan", "/api/cluster/load"):
        async with http.post(url + path, json={"model": "demo", "placement": WISH}) as answer:
            assert answer.status == 200
        assert cluster.asked[-1].placement == PARSED_WISH
    async with http.post(url + path, json={"model": "demo", "policy": "spread"}):
        assert cluster.asked[-1].placement == PlacementWish(policy="spread")


@pytest.mark.parametrize("path", [*(path for path, _ in REQUESTS), "/api/cluster/load"])
async def test_a_file_and_external_workers_are_registered_first(
    serve: Serve, http: ClientSession, path: str
) -> None:
    service, cluster = ScriptedService(chunk("hello"), chunk(finish="stop"), usage_chunk()), PlainCluster()
    services = parts(service, cluster=cluster)
    url = await serve(services)
    body = dict(REQUESTS).get(path, {})
    placement = {"file": "/models/x.gguf", "external": ["10.0.0.9:50052"]}
    async with http.post(url + path, json={"model": "x", "placement": placement, **body}) as answer:
        assert answer.status == 200, await answer.text()
    library: Any = services.library
    assert library.files == ["/models/x.gguf"]
    assert cluster.asked[0] == ("external", ("10.0.0.9:50052",))


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/embeddings", {"input": "a"}), ("/tokenize", {"content": "a"})]
)
async def test_placement_applies_to_embeddings_and_tokens(
    serve: Serve, http: ClientSession, path: str, body: dict[str, Any]
) -> None:
    cluster, service = PlainCluster(), ScriptedService(b"{}")
    services = parts(service, cluster=cluster)
    url = await serve(services)
    placement = {"file": "/models/x.gguf", "external": ["10.0.0.9:50052"]}
    fields = {"model": "x", "placement": placement, "num_ctx": 2048, **body}
    async with http.post(url + path, json=fields) as answer:
        assert answer.status == 200, await answer.text()
        assert "X-Sollold-Warning" not in answer.headers
    library: Any = services.library
    assert library.files == ["/models/x.gguf"]
    assert cluster.asked[0] == ("external", ("10.0.0.9:50052",))
    assert service.asks[0].placement == PlacementWish(external=("10.0.0.9:50052",))
    assert service.asks[0].context == 2048


async def test_a_file_is_refused_from_another_machine(serve: Serve, http: ClientSession) -> None:
    services = parts(ScriptedService())
    url = await serve(services)
    body = {"model": "x", "messages": MESSAGES, "placement": {"file": "/models/x.gguf"}}
    headers = {"X-Forwarded-For": "10.0.0.7"}
    async with http.post(f"{url}/api/chat", json=body, headers=headers) as answer:
        assert answer.status == 403
        assert "own machine" in (await answer.json())["error"]
    library: Any = services.library
    assert library.files == []


async def test_unknown_external_workers_need_a_key_from_another_machine(
    serve: Serve, http: ClientSession
) -> None:
    known = ExternalWorker("10.0.0.9:50052", ExternalState.USABLE)
    cluster = PlainCluster(record(plain=(known,)))
    service = ScriptedService(chunk("hello"), chunk(finish="stop"), usage_chunk())
    url = await serve(parts(service, cluster=cluster))
    headers = {"X-Forwarded-For": "10.0.0.7"}
    for address, status in (("127.0.0.1:22", 401), ("10.0.0.9:50052", 200)):
        plan = {"model": "demo", "placement": {"external": [address]}}
        chat = {**plan, "messages": MESSAGES}
        for path, body in (
            ("/api/chat", chat),
            ("/v1/chat/completions", chat),
            ("/api/cluster/plan", plan),
        ):
            async with http.post(url + path, json=body, headers=headers) as answer:
                assert answer.status == status, await answer.text()
        assert bool(cluster.asked) == (status == 200)
