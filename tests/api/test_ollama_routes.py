"""Ollama's routes: chat and load records, tags, show and ps, pull, create, copy, delete, the relay."""

from __future__ import annotations

import json
from typing import Any

import pytest
from aiohttp import ClientSession

from sollold.control.local_models import NameOverrides
from sollold.control.models import Running
from sollold.errors import Fault, Refusal
from sollold.serving.request import Engine
from tests.api.api_parts import (
    CHAT,
    PlainLibrary,
    PlainRelayed,
    ScriptedPuller,
    ScriptedRelay,
    ScriptedService,
    call_of,
    chunk,
    endpoint,
    model,
    parts,
    usage_chunk,
)
from tests.api.conftest import Serve
from tests.doubles import until


async def test_chat_streams_lines_with_routing_in_the_last(serve: Serve, http: ClientSession) -> None:
    service = ScriptedService(
        chunk(None, role="assistant"), chunk("Hel"), chunk("lo"), chunk(finish="stop"), usage_chunk()
    )
    url = await serve(parts(service))
    # curl's default Content-Type.
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    async with http.post(f"{url}/api/chat", data=json.dumps(CHAT), headers=headers) as answer:
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "application/x-ndjson"
        assert answer.headers["X-Sollold-Backend"] == "llama.cpp-distributed"
        assert answer.headers["X-Sollold-Node"] == "beta"
        lines = [json.loads(line) async for line in answer.content]
    assert [line["message"]["content"] for line in lines] == ["Hel", "lo", ""]
    assert [line["done"] for line in lines] == [False, False, True]
    last = lines[-1]
    assert last["done_reason"] == "stop"
    assert last["prompt_eval_count"] == 7 and last["eval_count"] == 2
    assert last["eval_duration"] == 20_250_000 and last["prompt_eval_duration"] == 10_500_000
    assert last["load_duration"] == 12_000_000 and last["total_duration"] > 0
    assert last["_routing"]["backend"] == "llama.cpp-distributed"
    assert last["_routing"]["coordinator_url"] == "http://10.0.0.1:11435"
    assert last["_routing"]["devices"] == ["alpha/CPU", "beta/CPU"]
    await until(lambda: service.closed == 1)


async def test_chat_not_streamed(serve: Serve, http: ClientSession) -> None:
    whole = {
        "choices": [
            {"finish_reason": "length", "index": 0, "message": {"role": "assistant", "content": "Hello"}}
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 1},
        "timings": {"prompt_n": 3, "prompt_ms": 1.0, "predicted_n": 1, "predicted_ms": 2.0},
    }
    service = ScriptedService(whole)
    url = await serve(parts(service))
    async with http.post(f"{url}/v1/api/chat", json={**CHAT, "stream": False}) as answer:
        record = await answer.json()
    assert record["message"] == {"role": "assistant", "content": "Hello"}
    assert record["done"] is True and record["done_reason"] == "length"
    assert record["_routing"]["node"] == "beta"
    assert call_of(service).body["stream"] is False


async def test_ollamas_lines_are_passed_on_with_routing_in_the_last(
    serve: Serve, http: ClientSession
) -> None:
    first = b'{"model":"demo","message":{"role":"assistant","content":"\\"done\\":true"},"done":false}'
    last = b'{"model":"demo","message":{"role":"assistant","content":""},"done":true,"eval_count":1}'
    service = ScriptedService(first, last, engine=Engine.OLLAMA)
    url = await serve(parts(service))
    async with http.post(f"{url}/api/chat", json={**CHAT, "options": {"odd": 1}}) as answer:
        lines = (await answer.read()).splitlines()
    assert lines[0] == first
    assert json.loads(lines[1])["_routing"]["backend"] == "ollama-pool"
    assert call_of(service, Engine.OLLAMA).body == {**CHAT, "options": {"odd": 1}}


async def test_empty_requests_load_and_unload(serve: Serve, http: ClientSession) -> None:
    service = ScriptedService()
    url = await serve(parts(service))
    async with http.post(f"{url}/api/generate", json={"model": "demo"}) as answer:
        record = await answer.json(content_type=None)
    assert record["done_reason"] == "load" and record["response"] == "" and record["done"] is True
    assert service.asks[-1].load_only and service.asks[-1].keep_alive is None
    async with http.post(
        f"{url}/api/chat", json={"model": "demo", "keep_alive": 0, "stream": False}
    ) as answer:
        record = await answer.json()
    assert record["done_reason"] == "unload" and record["message"]["content"] == ""
    assert service.asks[-1].keep_alive == 0


@pytest.mark.parametrize(
    ("keep_alive", "seconds"), [("5m", 300), (90, 90), ("-1m", -1), (-1, -1), ("1h30m", 5400), (0, 0)]
)
async def test_keep_alive_in_all_forms(
    serve: Serve, http: ClientSession, keep_alive: Any, seconds: float
) -> None:
    service = ScriptedService(chunk(finish="stop"))
    url = await serve(parts(service))
    async with http.post(f"{url}/api/chat", json={**CHAT, "keep_alive": keep_alive}) as answer:
        assert answer.status == 200
    assert service.asks[-1].keep_alive == seconds


async def test_tags_show_and_ps_cover_the_cluster(serve: Serve, http: ClientSession) -> None:
    library = PlainLibrary(model(params='{"temperature":0.5,"stop":["<a>","<b>"]}', template="T"))
    library.loaded = (Running(endpoint(), "alpha"), Running(endpoint(id="d2"), "beta"))
    url = await serve(parts(library=library))
    async with http.get(f"{url}/api/tags") as answer:
        (entry,) = (await answer.json())["models"]
    assert entry["name"] == entry["model"] == "demo:latest"
    assert entry["nodes"] == ["alpha", "beta"] and entry["capabilities"] == ["completion"]
    assert entry["details"]["parameter_size"] == "8.0B" and entry["details"]["families"] == ["llama"]
    async with http.head(f"{url}/api/tags") as answer:
        assert answer.status == 200
    async with http.post(f"{url}/api/show", json={"name": "demo"}) as answer:
        shown = await answer.json()
    assert shown["model_info"]["general.architecture"] == "llama"
    assert shown["model_info"]["tokenizer.ggml.tokens"] is None
    assert shown["template"] == "T" and shown["capabilities"] == ["completion"]
    assert shown["parameters"].splitlines()[0].split() == ["temperature", "0.5"]
    settings = {"system": "Be brief.", "options": {"seed": 1}}
    async with http.post(f"{url}/api/show", json={"model": "demo", **settings}) as answer:
        shown = await answer.json()
        assert shown["system"] == "Be brief." and shown["parameters"].splitlines()[-1].split() == [
            "seed",
            "1",
        ]
    async with http.post(f"{url}/api/show", json={"model": "demo", "verbose": True}) as answer:
        assert (await answer.json())["model_info"]["tokenizer.ggml.tokens"] == ["a", "b"]
    async with http.get(f"{url}/api/ps") as answer:
        (loaded,) = (await answer.json())["models"]
    assert loaded["nodes"] == ["alpha", "beta"] and loaded["size_vram"] == 1200 and loaded["size"] == 2000
    assert loaded["context_length"] == 2048 and loaded["expires_at"].endswith("Z")


async def test_pull_streams_its_progress(serve: Serve, http: ClientSession) -> None:
    steps = (
        {"status": "pulling manifest"},
        {"status": "pulling", "total": 9, "completed": 3},
        {"status": "success"},
    )
    url = await serve(parts(puller=ScriptedPuller(*steps)))
    async with http.post(f"{url}/api/pull", json={"model": "demo"}) as answer:
        assert [json.loads(line) async for line in answer.content] == list(steps)
    async with http.post(f"{url}/api/pull", json={"model": "demo", "stream": False}) as answer:
        assert await answer.json() == {"status": "success"}
    url = await serve(parts(puller=ScriptedPuller(Refusal(Fault.NOT_FOUND, "no such repository"))))
    async with http.post(f"{url}/api/pull", json={"model": "demo"}) as answer:
        assert answer.status == 404
    url = await serve(
        parts(puller=ScriptedPuller(steps[0], Refusal(Fault.UNAVAILABLE, "the network is down")))
    )
    async with http.post(f"{url}/api/pull", json={"model": "demo"}) as answer:
        last = [json.loads(line) async for line in answer.content][-1]
    assert last == {"error": "the network is down", "code": 503}


async def test_routes_that_need_ollama_answer_501_without_one(serve: Serve, http: ClientSession) -> None:
    url = await serve(parts())
    for path in ("/api/push", "/api/create"):
        async with http.post(url + path, json={"model": "demo"}) as answer:
            assert answer.status == 501 and "Ollama" in (await answer.json())["error"]
    async with http.post(f"{url}/api/blobs/sha256:{'0' * 64}", data=b"x") as answer:
        assert answer.status == 501
    async with http.post(f"{url}/api/blobs/nonsense", data=b"x") as answer:
        assert answer.status == 400


async def test_a_model_that_no_ollama_has_gets_a_specific_error(serve: Serve, http: ClientSession) -> None:
    answer = PlainRelayed(b'{"error":"model not found"}', status=404)
    url = await serve(parts(relay=ScriptedRelay(answer)))
    create: dict[str, Any] = {"model": "mine", "from": "demo", "quantize": "q4_K_M"}
    for path, body in (("/api/push", {"model": "demo"}), ("/api/create", create)):
        async with http.post(url + path, json=body) as response:
            assert response.status == 404
            assert "none has demo:latest: create it there" in (await response.json())["error"]
    async with http.post(f"{url}/api/push", json={"model": "nowhere"}) as response:
        assert await response.json() == {"error": "model not found"}
    assert answer.closed == 3


async def test_an_interrupted_relayed_answer_ends_with_an_error_line(
    serve: Serve, http: ClientSession
) -> None:
    broken = Refusal(Fault.INTERRUPTED, "the Ollama on beta broke off its answer")
    answer = PlainRelayed(b'{"status":"one"}\n', broken, kind="application/x-ndjson")
    relay = ScriptedRelay(answer)
    url = await serve(parts(relay=relay))
    async with http.post(f"{url}/api/create", json={"model": "x", "from": "base:7b"}) as response:
        assert response.status == 200 and response.content_type == "application/x-ndjson"
        lines = (await response.text()).splitlines()
    assert lines[0] == '{"status":"one"}'
    assert "broke off" in json.loads(lines[1])["error"] and len(lines) == 2
    assert answer.closed == 1
    async with http.post(f"{url}/api/push", json={"name": "me/x"}) as response:
        await response.read()
    blob = f"/api/blobs/sha256:{'0' * 64}"
    async with http.post(url + blob, data=b"GGUF") as response:
        await response.read()
    assert [(path, model) for _, path, _, model in relay.sent] == [
        ("/api/create", "base:7b"),
        ("/api/push", "me/x"),
        (blob, ""),
    ]
    assert relay.sent[2][2] == b"GGUF"


UNREADABLE = model(
    files=(), source="ollama", only_ollama="Its files can't be read.", context_train=0, layers=0
)


async def test_show_relays_ollamas_answer_for_a_model_only_it_can_read(
    serve: Serve, http: ClientSession
) -> None:
    details = {
        "template": "{{ .Prompt }}",
        "model_info": {"llama.context_length": 8192},
        "capabilities": ["tools"],
    }
    answer = PlainRelayed(json.dumps(details)[:9].encode(), json.dumps(details)[9:].encode())
    relay = ScriptedRelay(answer)
    url = await serve(parts(ScriptedService(), UNREADABLE, relay=relay))
    async with http.post(f"{url}/api/show", json={"name": "demo", "verbose": True}) as response:
        assert await response.json() == {**details, "nodes": ["alpha", "beta"]}
    ((_, path, body, name),) = relay.sent
    assert (path, name) == ("/api/show", "demo:latest") and answer.closed == 1
    assert json.loads(body) == {"model": "demo:latest", "verbose": True}


@pytest.mark.parametrize(
    "answer",
    [
        PlainRelayed(b'{"error":"gone"}', status=404),
        PlainRelayed(b"nonsense"),
        PlainRelayed(b"{", Refusal(Fault.INTERRUPTED, "broke off")),
        None,
    ],
)
async def test_show_omits_facts_that_ollama_does_not_provide(
    serve: Serve, http: ClientSession, answer: PlainRelayed | None
) -> None:
    """Clients would use a context length of 0; they have a default for a missing one."""
    relay = ScriptedRelay(answer) if answer is not None else None
    url = await serve(parts(ScriptedService(), UNREADABLE, relay=relay))
    async with http.post(f"{url}/api/show", json={"model": "demo"}) as response:
        shown = await response.json()
    assert shown["model_info"]["general.architecture"] == "llama"
    assert not [key for key in shown["model_info"] if key.endswith(("context_length", "block_count"))]


async def test_a_relayed_answer_is_closed_when_its_client_disconnects(
    serve: Serve, http: ClientSession
) -> None:
    answer = PlainRelayed(b"one\n")
    answer.hangs = True
    url = await serve(parts(relay=ScriptedRelay(answer)))
    async with http.post(f"{url}/api/push", json={"model": "x"}) as response:
        assert await response.content.readline() == b"one\n"
        assert not answer.closed
        response.close()
    await until(lambda: answer.closed)


async def test_create_without_ollama_makes_a_name_with_overrides(serve: Serve, http: ClientSession) -> None:
    library = PlainLibrary(model(params='{"top_k":1,"seed":2}'))
    url = await serve(parts(library=library))
    body = {"model": "brief", "from": "demo", "system": "Be brief.", "parameters": {"top_k": 3}}
    async with http.post(f"{url}/api/create", json=body) as answer:
        assert answer.status == 200 and answer.content_type == "application/x-ndjson"
        assert json.loads((await answer.read()).splitlines()[-1]) == {"status": "success"}
    assert library.copied == [("demo:latest", "brief", ())]
    assert library.told == NameOverrides("Be brief.", '{"top_k":3,"seed":2}', None)
    plain = {"name": "again", "from": "demo", "license": ["a", "b"], "stream": False}
    async with http.post(f"{url}/api/create", json=plain) as answer:
        assert await answer.json() == {"status": "success"}
    assert library.told == NameOverrides(None, None, "a\nb")
    conversation = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]
    shaped = {"model": "shaped", "from": "demo", "template": "{{ .Prompt }}!", "messages": conversation}
    async with http.post(f"{url}/api/create", json=shaped) as answer:
        assert answer.status == 200
    assert library.told == NameOverrides(
        template="{{ .Prompt }}!", messages=(("user", "Who?"), ("assistant", "I."))
    )
    more: dict[str, Any]
    for more in ({"files": {"a.gguf": "sha256:0"}}, {"quantize": "q4_0"}):
        async with http.post(f"{url}/api/create", json={**body, **more}) as answer:
            assert answer.status == 501 and "Ollama" in (await answer.json())["error"]
    for more, status in (
        ({"from": "none"}, 404),
        ({"parameters": {"top_k": "many"}}, 400),
        ({"system": "x" * 100_001}, 400),
        ({"template": "{{ .Prompt }}" * 10_000}, 400),
        ({"template": "{{ .Nothing }}"}, 400),
        ({"template": "{{ if }}"}, 400),
        ({"messages": [{"role": "alien", "content": "x"}]}, 400),
        ({"messages": [{"role": "user", "content": "x" * 100_001}]}, 400),
        ({"model": ""}, 400),
    ):
        async with http.post(f"{url}/api/create", json={**body, **more}) as answer:
            assert answer.status == status, more
    assert len(library.copied) == 3


async def test_create_from_a_model_outside_ollama_makes_a_name(serve: Serve, http: ClientSession) -> None:
    library = PlainLibrary(model(source="folder"), model("theirs:latest", source="ollama"))
    relay = ScriptedRelay(PlainRelayed(b'{"status":"success"}\n'))
    url = await serve(parts(library=library, relay=relay))
    for body, relayed in (
        ({"model": "brief", "from": "demo", "system": "Be brief."}, False),
        ({"model": "brief", "from": "theirs", "system": "Be brief."}, True),
        ({"model": "brief", "from": "demo", "template": "{{ .Prompt }}"}, False),
        # Ollama may pull it.
        ({"model": "brief", "from": "elsewhere"}, True),
        ({"name": "old", "modelfile": "FROM demo"}, False),
        ({"name": "old", "modelfile": "FROM theirs"}, True),
        ({"model": "odd", "from": 5}, True),
    ):
        before = len(relay.sent)
        async with http.post(f"{url}/api/create", json=body) as answer:
            assert answer.status == 200, body
            assert json.loads((await answer.read()).splitlines()[-1]) == {"status": "success"}
        assert len(relay.sent) - before == relayed, body
    assert library.copied == [*[("demo:latest", "brief", ())] * 2, ("demo:latest", "old", ())]


async def test_copy_and_delete(serve: Serve, http: ClientSession) -> None:
    library = PlainLibrary(model())
    url = await serve(parts(library=library))
    async with http.post(f"{url}/api/copy", json={"source": "demo", "destination": "mine"}) as answer:
        assert answer.status == 200 and await answer.read() == b""
    async with http.delete(f"{url}/api/delete", json={"model": "demo"}) as answer:
        assert answer.status == 200
    assert library.copied == [("demo", "mine", ())] and library.deleted == [("demo", ())]
    body = {"source": "demo", "destination": "mine", "nodes": ["alpha"]}
    async with http.post(f"{url}/api/copy", json=body) as answer:
        assert answer.status == 200
    async with http.delete(f"{url}/api/delete", json={"model": "demo", "nodes": ["beta"]}) as answer:
        assert answer.status == 200
    assert library.copied[1:] == [("demo", "mine", ("alpha",))] and library.deleted[1:] == [
        ("demo", ("beta",))
    ]
    async with http.delete(f"{url}/api/delete", json={"model": "demo", "nodes": "beta"}) as answer:
        assert answer.status == 400
