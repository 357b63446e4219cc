"""``/v1/responses``: stored responses, item references, custom tools, the store."""

from __future__ import annotations

import json
from typing import Any

import pytest
from aiohttp import ClientSession
from openai import AsyncOpenAI, BadRequestError, NotFoundError

from sollold.cluster.net.rpc import PeerError
from sollold.control.responses import (
    ResponseReply,
    ResponseRequest,
    ResponseService,
    ResponseStore,
    StoredResponse,
)
from tests.api.api_parts import ScriptedService, call_of, chunk, model, parts, text_service, usage_chunk
from tests.api.conftest import Serve
from tests.api.dialects import post
from tests.api.watched_loop import watched

TOOL_MODEL = model(capabilities=("completion", "tools"))


def sent(service: ScriptedService) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in call_of(service).body["messages"]]


async def test_a_response_is_continued_by_its_id(serve: Serve) -> None:
    service = text_service("Hello")
    url = await serve(parts(service))
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="sk-mine", max_retries=0) as client:
        first = await client.responses.create(model="demo", input="one", instructions="Be brief.")
        second = await client.responses.create(
            model="demo", input=[{"role": "user", "content": "two"}], previous_response_id=first.id
        )
        assert second.previous_response_id == first.id
        # Instructions are not inherited.
        assert sent(service) == [("user", "one"), ("assistant", "Hello"), ("user", "two")]
        await client.responses.create(model="demo", input="three", previous_response_id=second.id)
        assert [content for _, content in sent(service)] == ["one", "Hello", "two", "Hello", "three"]
        retrieved = await client.responses.retrieve(first.id)
        assert retrieved.output_text == "Hello" and retrieved.usage is not None
        items = await client.responses.input_items.list(first.id)
        (item,) = items.data
        assert item.type == "message" and item.id and items.first_id == item.id  # type: ignore[attr-defined]
        assert [part.text for part in item.content] == ["one"]  # type: ignore[union-attr]
        for reference in ({"type": "item_reference", "id": item.id}, {"id": item.id}):
            items_sent: Any = [reference, {"role": "user", "content": "more"}]
            await client.responses.create(model="demo", input=items_sent)
            assert sent(service) == [("user", "one"), ("user", "more")]
        # Only synchronous responses are stored.
        with pytest.raises(BadRequestError, match="Cannot cancel a synchronous response"):
            await client.responses.cancel(first.id)
        with pytest.raises(NotFoundError, match="resp_none"):
            await client.responses.cancel("resp_none")
        with pytest.raises(BadRequestError, match="truncation"):
            await client.responses.compact(model="demo", input="one")
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="sk-other", max_retries=0) as other:
            with pytest.raises(NotFoundError):
                await other.responses.retrieve(first.id)
        with pytest.raises(BadRequestError, match="omit stream"):
            # The client would get a stream without events.
            await client.responses.retrieve(first.id, stream=True)
        await client.responses.delete(first.id)
        with pytest.raises(NotFoundError):
            await client.responses.retrieve(first.id)
        unkept = await client.responses.create(model="demo", input="one", store=False)
        with pytest.raises(NotFoundError):
            await client.responses.retrieve(unkept.id)


async def test_input_items_are_listed_in_pages(serve: Serve, http: ClientSession) -> None:
    url = await serve(parts(text_service("Hello"), TOOL_MODEL))
    items_sent: list[dict[str, Any]] = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "get", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "noon"},
        {"role": "user", "content": [{"type": "input_text", "text": "three"}]},
    ]
    _, answer, _ = await post(http, f"{url}/v1/responses", {"model": "demo", "input": items_sent})
    path = f"{url}/v1/responses/{answer['id']}/input_items"

    async def input_items(query: str) -> Any:
        async with http.get(f"{path}?{query}") as response:
            return await response.json()

    items = (await input_items("order=asc"))["data"]
    assert [item["type"] for item in items] == [
        "message",
        "message",
        "function_call",
        "function_call_output",
        "message",
    ]
    ids = [item["id"] for item in items]
    assert len(set(ids)) == 5 and ids[2] == "fc_1" and {item["status"] for item in items} == {"completed"}
    assert [item["content"][0]["type"] for item in items if item["type"] == "message"] == [
        "input_text",
        "output_text",
        "input_text",
    ]
    newest = await input_items("limit=2")
    assert [item["id"] for item in newest["data"]] == ids[:2:-1] and newest["has_more"] is True
    rest = await input_items(f"limit=3&after={newest['last_id']}")
    assert [item["id"] for item in rest["data"]] == ids[2::-1] and rest["has_more"] is False
    for query, word in (
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("order=up", "order"),
        ("after=x", "x"),
    ):
        assert word in (await input_items(query))["error"]["message"]


async def test_streamed_responses_are_stored_and_items_are_found_by_reference(
    serve: Serve, http: ClientSession
) -> None:
    """Vercel's AI SDK sends these two requests."""
    service = text_service("Hello")
    url = await serve(parts(service))
    async with http.post(
        f"{url}/v1/responses", json={"model": "demo", "input": "a", "stream": True}
    ) as answer:
        events = [json.loads(line[6:]) async for line in answer.content if line.startswith(b"data: {")]
    item = events[-1]["response"]["output"][0]["id"]
    for reference in ({"type": "item_reference", "id": item}, {"id": item}):
        items_sent = [{"role": "user", "content": "a"}, reference, {"role": "user", "content": "b"}]
        status, _, _ = await post(http, f"{url}/v1/responses", {"model": "demo", "input": items_sent})
        assert status == 200 and sent(service) == [("user", "a"), ("assistant", "Hello"), ("user", "b")]
    items_sent = [{"type": "item_reference", "id": "msg_none"}]
    status, refusal, _ = await post(http, f"{url}/v1/responses", {"model": "demo", "input": items_sent})
    assert status == 404 and "msg_none" in refusal["error"]["message"]
    body = {"model": "demo", "input": "a", "previous_response_id": "resp_none"}
    status, refusal, _ = await post(http, f"{url}/v1/responses", body)
    assert status == 400 and "resp_none" in refusal["error"]["message"]
    # By which clients know that they must send the whole conversation.
    assert refusal["error"]["code"] == "previous_response_not_found"


async def test_custom_tools_are_called_with_text_input(serve: Serve, http: ClientSession) -> None:
    pieces = ({"name": "patch", "arguments": ""}, {"arguments": '{"input": "*** Be'}, {"arguments": 'gin"}'})
    calls = [chunk(tool_calls=[{"index": 0, "id": "c1", "function": piece}]) for piece in pieces]
    service = ScriptedService(*calls, chunk(finish="tool_calls"), usage_chunk())
    url = await serve(parts(service, TOOL_MODEL))
    tools = [{"type": "custom", "name": "patch", "description": "Patches."}, {"type": "web_search"}]
    body = {"model": "demo", "input": "go", "tools": tools}
    status, answer, headers = await post(http, f"{url}/v1/responses", body)
    assert status == 200 and "web_search" in headers["X-Sollold-Warning"]
    (item,) = answer["output"]
    assert (item["type"], item["name"], item["input"], item["call_id"]) == (
        "custom_tool_call",
        "patch",
        "*** Begin",
        "c1",
    )
    (tool,) = call_of(service).body["tools"]
    assert tool["function"]["parameters"]["required"] == ["input"]
    async with http.post(f"{url}/v1/responses", json={**body, "stream": True}) as streamed:
        events = [json.loads(line[6:]) async for line in streamed.content if line.startswith(b"data: {")]
    done = next(event for event in events if event["type"] == "response.custom_tool_call_input.done")
    assert done["input"] == "*** Begin" and done["output_index"] == 0
    # The next request has the call, its result and items of other servers.
    items_sent = [
        {"role": "user", "content": "go"},
        {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"query": "x"}},
        {"type": "compaction", "id": "cmp_1", "encrypted_content": "…"},
        item,
        {
            "type": "custom_tool_call_output",
            "call_id": "c1",
            "output": [{"type": "input_text", "text": "done"}],
        },
    ]
    status, _, headers = await post(http, f"{url}/v1/responses", {**body, "input": items_sent})
    assert status == 200 and "compaction" in headers["X-Sollold-Warning"]
    user, assistant, result = call_of(service).body["messages"]
    assert user["content"] == "go" and result == {"role": "tool", "tool_call_id": "c1", "content": "done"}
    assert json.loads(assistant["tool_calls"][0]["function"]["arguments"]) == {"input": "*** Begin"}


def stored(id_: str, text: str = "", previous: str = "", client: str = "") -> StoredResponse:
    output = [{"id": f"msg_{id_}", "type": "message", "content": text}]
    return StoredResponse({"id": id_, "output": output}, [{"role": "user", "content": id_}], previous, client)


def test_the_store_is_bounded_and_evicts_the_oldest() -> None:
    store = ResponseStore(most=3, most_bytes=2000)
    for number in range(5):
        store.put(stored(f"r{number}"))
    assert len(store) == 3 and store.get("r1", "") is None and store.get("msg_r1", "") is None
    assert store.get("msg_r4", "") == store.get("r4", "") == stored("r4")
    store.put(stored("big", "x" * 1600))
    assert store.get("big", "") is not None and len(store) < 3
    store.put(stored("huge", "x" * 3000))
    assert store.get("huge", "") is None and store.get("big", "") is not None
    store.put(stored("mine", client="key:a"))
    assert store.get("mine", "key:b") is None and store.get("mine", "key:a") is not None


class Peers:
    """RPC between services in one process."""

    def __init__(self) -> None:
        self.handlers: dict[str, Any] = {}
        self.joining = ""

    def method(self, name: str, request: type, handler: Any) -> None:
        assert (name, request) == ("response", ResponseRequest)
        self.handlers[self.joining] = handler

    async def call(self, node: str, method: str, request: Any, reply: Any, *, timeout: float) -> Any:
        if node not in self.handlers:
            raise PeerError("", "it is gone", transport=True)
        answer = await self.handlers[node]("", request)
        assert isinstance(answer, ResponseReply)
        return answer


async def test_responses_are_found_on_other_nodes() -> None:
    peers, nodes = Peers(), ("a" * 16, "b" * 16)
    services = []
    for node in nodes:
        service: Any = ResponseService(node, peers)  # type: ignore[arg-type]
        peers.joining = node
        service.register(peers)
        services.append(service)
    first_service, second_service = services
    first, second = first_service.new_id("resp"), second_service.new_id("resp")
    first_service.put(stored(first))
    second_service.put(stored(second, previous=first))
    assert (await second_service.get(first, "")).response["id"] == first
    conversation = await first_service.conversation(second, "")
    assert [item.get("content") for item in conversation] == [first, "", second, ""]
    assert (
        await second_service.get(first, "", delete=True) is not None
        and await first_service.get(first, "") is None
    )
    assert await first_service.conversation(second, "") is None
    del peers.handlers[nodes[1]]
    assert await first_service.get(second, "") is None
    assert await first_service.get("resp_nonsense", "") is None and await first_service.items(["x"], "") == {}


async def test_many_references_to_a_large_item_are_refused(serve: Serve, http: ClientSession) -> None:
    service = text_service("Hello")
    url = await serve(parts(service)) + "/v1/responses"
    large = {"role": "user", "content": "x" * (4 << 20)}
    _, first, _ = await post(
        http, url, {"model": "demo", "input": [large, *[{"role": "user", "content": "y"}] * 1000]}
    )
    async with http.get(f"{url}/{first['id']}/input_items?order=asc&limit=2") as answer:
        long, short = [item["id"] for item in (await answer.json())["data"]]
    async with watched() as loop:
        refused = await post(http, url, {"model": "demo", "input": [{"id": long}] * 2000})
        # Different items of one response.
        prefix = short[:-4]
        references = [{"id": f"{prefix}{number:04x}"} for number in range(1, 1000)]
        accepted = await post(http, url, {"model": "demo", "input": references})
    assert refused[0] == 413 and "referenced" in refused[1]["error"]["message"]
    assert accepted[0] == 200 and len(sent(service)) == 999
    assert loop.longest < 0.25
