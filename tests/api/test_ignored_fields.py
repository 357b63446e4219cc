"""Each field of a request has an effect, is named in a warning, or is refused; none is silently ignored."""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp import ClientSession

from sollold.serving.request import Engine
from tests.api.api_parts import (
    BODIES,
    CHAT,
    ScriptedService,
    call_of,
    model,
    parts,
    text_service,
)
from tests.api.conftest import Serve

TOOL_MODEL = model(capabilities=("completion", "tools", "thinking"))
EMBEDDING_MODEL = model("words:latest", capabilities=("embedding",))
ROUTES = {**BODIES, "/infill": {"model": "demo", "input_prefix": "a", "input_suffix": "b"}}
V1 = tuple(path for path in ROUTES if path.startswith("/v1"))


async def warning_for(http: ClientSession, url: str, body: dict[str, Any]) -> str:
    async with http.post(url, json={"stream": True, **body}) as answer:
        assert answer.status == 200, await answer.text()
        return answer.headers.get("X-Sollold-Warning", "")


@pytest.mark.parametrize("path", ROUTES)
async def test_unknown_fields_are_named(serve: Serve, http: ClientSession, path: str) -> None:
    service = text_service()
    url = await serve(parts(service, TOOL_MODEL))
    plain = ROUTES[path]
    assert "no effect" not in await warning_for(http, url + path, plain)
    for name, value in (("min_tokens", 3), ("bad_words", ["x"]), ("stop_token_ids", [7]), ("beams", 2.5)):
        warning = f"{name} has no effect: it is not known here"
        assert warning in await warning_for(http, url + path, {**plain, name: value})
        if path != "/infill":
            assert any(note.startswith(warning) for note in call_of(service, Engine.OLLAMA).notes)
    nothing: object
    for nothing in (None, "", [], {}, False):
        assert "no effect" not in await warning_for(http, url + path, {**plain, "use_beam_search": nothing})
    assert "skip_special_tokens" in await warning_for(
        http, url + path, {**plain, "skip_special_tokens": False}
    )
    assert "skip_special" not in await warning_for(http, url + path, {**plain, "skip_special_tokens": True})
    many = await warning_for(http, url + path, {**plain, **{f"odd{n}": 1 for n in range(20)}})
    assert "12 more fields have no effect" in many and len(many) < 1000
    long = await warning_for(http, url + path, {**plain, "x" * 5000: 1})
    assert "x" * 40 + " has no effect" in long


INERT: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "store": True,
        "verbosity": "low",
        "moderation": {"model": "x"},
        "text": {"format": {"type": "text"}},
        "truncation": "auto",
        "web_search_options": {},
        "stream_options.continuous_usage_stats": True,
    },
    "/v1/responses": {
        "max_tool_calls": 3,
        "text.verbosity": "low",
        "context_management": [{"type": "compaction"}],
        "include": ["file_search_call.results"],
        "reasoning.context": "auto",
        "top_k": 3,
    },
    "/v1/messages": {
        "container": "c1",
        "context_management": {"edits": [1]},
        "fallbacks": ["x"],
        "output_config.task_budget": {"type": "tokens", "total": 5},
        "thinking.odd": 1,
        "min_p": 0.1,
    },
    "/api/chat": {"temperature": 0.5, "options.num_gpu": 3, "options.repetition_penalty": 1.1},
    "/api/generate": {"top_k": 5, "options.num_thread": 3, "options.tfs_z": 0.5, "messages": ["x"]},
    "/v1/completions": {"verbosity": "low", "tools": [{}], "prompt_logprobs": 1},
}


@pytest.mark.parametrize("path", INERT)
async def test_fields_without_effect_are_named(serve: Serve, http: ClientSession, path: str) -> None:
    url = await serve(parts(text_service(), TOOL_MODEL))
    for name, value in INERT[path].items():
        outer, _, inner = name.partition(".")
        nested = {outer: {**({"type": "disabled"} if outer == "thinking" else {}), inner: value}}
        body = {**ROUTES[path], **(nested if inner else {outer: value})}
        warned = await warning_for(http, url + path, body)
        assert f"{name} has no effect" in warned or f"{name} {value[0]} has no effect" in warned, name


@pytest.mark.parametrize(
    ("fields", "ignored"),
    [
        ({"reasoning": {"effort": "low", "max_tokens": 100, "exclude": True}}, ["max_tokens", "exclude"]),
        ({"thinking": {"type": "enabled", "budget_tokens": 100}}, ["budget_tokens"]),
        ({"reasoning": {"enabled": True, "summary": "auto"}, "thinking": {"type": "disabled"}}, []),
    ],
)
async def test_parts_of_other_servers_fields_for_thinking_warn_in_a_chat(
    serve: Serve, http: ClientSession, fields: dict[str, Any], ignored: list[str]
) -> None:
    url = await serve(parts(text_service(), TOOL_MODEL))
    warned = await warning_for(http, f"{url}/v1/chat/completions", {**CHAT, **fields})
    assert warned.count("has no effect") == len(ignored)
    assert all(f".{name} has no effect: send reasoning_budget_tokens" in warned for name in ignored[:1])


async def test_warnings_suggest_the_right_field(serve: Serve, http: ClientSession) -> None:
    url = await serve(parts(text_service()))
    warned = await warning_for(http, f"{url}/api/chat", {**CHAT, "temperature": 0.5})
    assert "it belongs in options: options.temperature" in warned
    warned = await warning_for(http, f"{url}/api/chat", {**CHAT, "options": {"repetition_penalty": 1.1}})
    assert "did you mean repeat_penalty?" in warned
    warned = await warning_for(http, f"{url}/v1/chat/completions", {**CHAT, "max_token": 5})
    assert "did you mean max_tokens?" in warned


QUIET: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "user": "u",
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "prediction": {"type": "content", "content": "x"},
        "store": False,
        "stream_options": {"include_usage": True, "include_obfuscation": False},
        "modalities": ["text"],
        "parallel_tool_calls": True,
        "reasoning_effort": "low",
        "cache_prompt": True,
        "samplers": ["top_k"],
        "chat_template_kwargs": {"a": 1},
        "keep_alive": 5,
        "priority": 5,
    },
    "/v1/responses": {"metadata": {}, "text": {"format": {"type": "text"}}, "reasoning": {"effort": "low"}},
    "/v1/messages": {
        "metadata": {"user_id": "u"},
        "service_tier": "auto",
        "thinking": {"type": "adaptive"},
        "output_config": {"effort": "low"},
    },
    "/api/chat": {"shift": True, "truncate": True, "keep_alive": 5, "options": {"num_ctx": 512, "seed": 1}},
    "/api/generate": {"system": "s", "options": {"num_predict": 1, "num_keep": 1}},
    "/v1/completions": {"user": "u", "cache_prompt": True, "logit_bias": {"5": 1}, "n": 1},
}


@pytest.mark.parametrize("path", QUIET)
async def test_effective_and_neutral_fields_are_not_named(
    serve: Serve, http: ClientSession, path: str
) -> None:
    url = await serve(parts(text_service(), TOOL_MODEL))
    assert await warning_for(http, url + path, {**ROUTES[path], **QUIET[path]}) == ""


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/infill"])
async def test_vllms_repetition_penalty_is_mapped(serve: Serve, http: ClientSession, path: str) -> None:
    service = text_service()
    url = await serve(parts(service))
    assert await warning_for(http, url + path, {**ROUTES[path], "repetition_penalty": "1.1"}) == ""
    sent = call_of(service).body
    assert sent["repeat_penalty"] == 1.1 and "repetition_penalty" not in sent
    both = {**ROUTES[path], "repetition_penalty": 1.1, "repeat_penalty": 1.2}
    await warning_for(http, url + path, both)
    assert call_of(service).body["repeat_penalty"] == 1.2


@pytest.mark.parametrize("path", V1)
async def test_num_ctx_is_read_in_each_dialect(serve: Serve, http: ClientSession, path: str) -> None:
    service = text_service()
    url = await serve(parts(service))
    assert await warning_for(http, url + path, {**ROUTES[path], "num_ctx": 2048}) == ""
    assert service.asks[-1].context == 2048
    assert "num_ctx" not in call_of(service).body
    async with http.post(url + path, json={**ROUTES[path], "num_ctx": 2**31}) as answer:
        assert answer.status == 400 and "num_ctx" in await answer.text()


async def test_options_that_goose_sends_to_a_chat_are_fields(serve: Serve, http: ClientSession) -> None:
    service = text_service()
    url = await serve(parts(service))
    path = "/v1/chat/completions"
    chat: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}
    chat |= {"options": {"num_ctx": 2048, "num_predict": 7}}
    assert await warning_for(http, url + path, chat) == ""
    assert service.asks[-1].context == 2048
    body = call_of(service).body
    assert body["max_tokens"] == 7 and "options" not in body
    warned = await warning_for(http, url + path, {**chat, "max_tokens": 5, "options": {"num_gpu": 1}})
    assert "options has no effect" in warned and call_of(service).body["max_tokens"] == 5
    await warning_for(http, url + path, {**chat, "max_completion_tokens": 6})
    assert 7 not in call_of(service).body.values()


async def test_ollama_gets_num_ctx_on_routes_that_have_it(serve: Serve, http: ClientSession) -> None:
    """On other routes there is a warning."""
    for path in V1:
        service = text_service()
        url = await serve(parts(service))
        await warning_for(http, url + path, {**ROUTES[path], "num_ctx": 2048})
        call = call_of(service, Engine.OLLAMA)
        supported = call.body.get("options", {}).get("num_ctx") == 2048
        assert supported is call.path.startswith("/api/")
        assert any("num_ctx has no effect" in note for note in call.notes) is not supported


@pytest.mark.parametrize("fields", [{"thinking": {"type": "disabled"}}, {"enable_thinking": False}])
async def test_thinking_is_disabled_by_fields_of_other_servers(
    serve: Serve, http: ClientSession, fields: dict[str, Any]
) -> None:
    service = text_service()
    url = await serve(parts(service, TOOL_MODEL))
    assert await warning_for(http, f"{url}/v1/chat/completions", {**CHAT, **fields}) == ""
    for engine in Engine:
        sent = call_of(service, engine).body
        assert sent["reasoning_effort"] == "none" and not sent.keys() & fields.keys()


async def test_fields_of_a_chat_that_ollama_ignores_are_named(serve: Serve, http: ClientSession) -> None:
    service = text_service()
    url = await serve(parts(service))
    fields = {"typical_p": 0.5, "dry_multiplier": 0.8, "repetition_penalty": 1.1, "mirostat": 2, "top_k": 4}
    await warning_for(http, f"{url}/v1/chat/completions", {**CHAT, **fields})
    notes = call_of(service, Engine.OLLAMA).notes
    assert [*notes] == [f"{name} has no effect: an Ollama answers" for name in fields]
    neutral = {"typical_p": 1, "repeat_penalty": 1.0, "temperature": 0.5, "seed": 3}
    await warning_for(http, f"{url}/v1/chat/completions", {**CHAT, **neutral})
    assert not call_of(service, Engine.OLLAMA).notes


@pytest.mark.parametrize(
    ("more", "ignored"),
    [
        ({}, ["logit_bias", "dry_multiplier"]),
        ({"suffix": "z", "num_ctx": 4096}, ["top_k", "logit_bias", "dry_multiplier"]),
    ],
)
async def test_fields_of_a_completion_that_ollama_ignores_are_named(
    serve: Serve, http: ClientSession, more: dict[str, Any], ignored: list[str]
) -> None:
    service = text_service()
    url = await serve(parts(service, model(capabilities=("completion", "insert"))))
    fields = {"top_k": 4, "temperature": 0.5, "logprobs": 1, "logit_bias": {"7": -100}, "dry_multiplier": 0.8}
    body = {"model": "demo", "prompt": "a", "typ_p": 0, "stream": True, **fields, **more}
    await warning_for(http, f"{url}/v1/completions", body)
    notes = call_of(service, Engine.OLLAMA).notes
    named = [note.removesuffix(" has no effect: an Ollama answers") for note in notes]
    assert [name for name in named if " " not in name] == ignored
    assert any("num_ctx" in note for note in notes) is bool(more)


async def test_embeddings_and_token_counts_warn_too(serve: Serve, http: ClientSession) -> None:
    vectors = b'{"data":[{"embedding":[1.0],"index":0}],"usage":{"prompt_tokens":1,"total_tokens":1}}'
    url = await serve(parts(ScriptedService(vectors), EMBEDDING_MODEL))
    for path in ("/v1/embeddings", "/api/embed", "/api/embeddings"):
        body = {"model": "words", "input": "a", "prompt": "a", "input_type": "query"}
        del body["prompt" if path != "/api/embeddings" else "input"]
        assert "input_type has no effect" in await warning_for(http, url + path, {**body, "stream": None}), (
            path
        )
    url = await serve(parts(ScriptedService(b'{"input_tokens":3}')))
    count = {**CHAT, "context_management": {"edits": [1]}, "stream": None}
    warned = await warning_for(http, f"{url}/v1/messages/count_tokens", count)
    assert "context_management has no effect" in warned
    items = {"model": "demo", "input": "a", "max_tool_calls": 3}
    warned = await warning_for(http, f"{url}/v1/responses/input_tokens", items)
    assert "max_tool_calls has no effect" in warned


async def test_an_unknown_truncation_is_refused(serve: Serve, http: ClientSession) -> None:
    url = await serve(parts(text_service()))
    body = {**ROUTES["/v1/responses"], "truncation": "middle"}
    async with http.post(f"{url}/v1/responses", json=body) as answer:
        assert answer.status == 400 and (await answer.json())["error"]["param"] == "truncation"


async def test_fields_passed_on_to_llama_server_cause_no_warning(serve: Serve, http: ClientSession) -> None:
    service = text_service()
    url = await serve(parts(service))
    fields = {"add_generation_prompt": False, "chat_template_kwargs": {"a": 1}, "reasoning_format": "none"}
    async with http.post(f"{url}/apply-template", json={**CHAT, **fields}) as answer:
        assert answer.status == 200 and "X-Sollold-Warning" not in answer.headers
    assert call_of(service).body.items() >= fields.items()
    url = await serve(parts(service, EMBEDDING_MODEL))
    async with http.post(
        f"{url}/v1/embeddings", json={"model": "words", "input": "a", "embd_normalize": -1}
    ) as answer:
        assert answer.status == 200 and "X-Sollold-Warning" not in answer.headers
    assert call_of(service).body["embd_normalize"] == -1
    assert call_of(service, Engine.OLLAMA).notes == ("embd_normalize has no effect: an Ollama answers",)
