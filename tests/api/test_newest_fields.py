"""Fields and blocks of newer clients: each has an effect, is named in a warning, or is refused."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from aiohttp import ClientSession

from sollold.api.anthropic.messages_ask import Messages, Tokens
from sollold.api.anthropic.request import messages_body, prompt_body
from sollold.api.engine.left_out import UNSEEN_IMAGE
from sollold.api.openai.responses_ask import ResponseAsk
from sollold.api.openai.responses_request import input_messages, response_body, response_warnings
from sollold.errors import Refusal
from tests.api.api_parts import CHAT, call_of, model, parts, text_service
from tests.api.conftest import Serve

TOOL_MODEL = model(capabilities=("completion", "tools", "thinking"))
USER: dict[str, Any] = {"role": "user", "content": "go"}
MESSAGES: dict[str, Any] = {"model": "demo", "max_tokens": 9, "messages": [USER]}
ASKS: dict[str, dict[str, Any]] = {
    "/v1/messages": MESSAGES,
    "/v1/responses": {"model": "demo", "input": "go"},
    "/v1/chat/completions": CHAT,
}


async def test_the_summary_of_a_compaction_reaches_the_model(serve: Serve, http: ClientSession) -> None:
    service = text_service()
    url = await serve(parts(service, TOOL_MODEL)) + "/v1/messages"
    failed = {"type": "compaction", "content": None}
    compaction = {"type": "compaction", "content": "We fixed a.py.", "encrypted_content": "…"}
    body = {**MESSAGES, "messages": [{"role": "assistant", "content": [failed, compaction]}, USER]}
    async with http.post(url, json=body) as answer:
        assert answer.status == 200 and "X-Sollold-Warning" not in answer.headers
    assert call_of(service).body["messages"] == [{"role": "assistant", "content": "We fixed a.py."}, USER]


@pytest.mark.parametrize("kind", ["web_search_tool_result", "mcp_tool_result", "container_upload"])
async def test_results_of_anthropics_tools_are_left_out_with_a_warning(
    serve: Serve, http: ClientSession, kind: str
) -> None:
    url = await serve(parts(text_service(), TOOL_MODEL)) + "/v1/messages"
    blocks = [{"type": kind, "tool_use_id": "s", "content": []}, {"type": "text", "text": "ok"}]
    body = {**MESSAGES, "messages": [USER, {"role": "assistant", "content": blocks}, USER]}
    async with http.post(url, json=body) as answer:
        assert answer.status == 200
        warned = answer.headers["X-Sollold-Warning"]
    assert warned == f"content blocks of type {kind} come from tools that ran at Anthropic and are left out"


CODE_ONLY = {"name": "get", "allowed_callers": ["code_execution_20260120"]}
FUNCTION = {"type": "function", "name": "get", "parameters": None, "allowed_callers": ["programmatic"]}
BOTH = {**FUNCTION, "allowed_callers": ["direct", "programmatic"]}


@pytest.mark.parametrize(
    ("path", "fields", "warning"),
    [
        ("/v1/messages", {"thinking": {"type": "between_tools"}}, "between_tools means disabled"),
        ("/v1/messages", {"output_config": {"effort": "low"}}, "output_config.effort has no effect"),
        ("/v1/messages", {"speed": "fast"}, ""),
        ("/v1/messages", {"tools": [CODE_ONLY]}, "allowed_callers has no effect"),
        (
            "/v1/messages",
            {"tools": [{"type": "browser_toolset_20260801"}, {"type": "computer_toolset_20260801"}]},
            "browser_toolset_20260801, computer_toolset_20260801 are known only to Anthropic's models",
        ),
        ("/v1/responses", {"tools": [FUNCTION]}, "allowed_callers has no effect"),
        ("/v1/responses", {"tools": [BOTH]}, ""),
        ("/v1/responses", {"prompt_cache_options": {"prewarm": True}}, "prompt_cache_options.prewarm has no"),
        ("/v1/responses", {"prompt_cache_options": {"mode": "explicit", "ttl": "12h"}}, ""),
        ("/v1/chat/completions", {"prompt_cache_options": {"prewarm": True}}, "prewarm has no effect"),
    ],
)
async def test_parts_without_effect_are_named(
    serve: Serve, http: ClientSession, path: str, fields: dict[str, Any], warning: str
) -> None:
    url = await serve(parts(text_service(), TOOL_MODEL)) + path
    async with http.post(url, json={**ASKS[path], "stream": True, **fields}) as answer:
        assert answer.status == 200, await answer.text()
        warned = answer.headers.get("X-Sollold-Warning", "")
    assert warning in warned and bool(warned) is bool(warning)


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        ("/v1/messages", {"output_config": {"format": {"type": "xml"}}}, "output format must be of type"),
        ("/v1/messages", {"output_format": {"schema": {"type": "object"}}}, "output format must be of type"),
        ("/v1/chat/completions", {"modalities": ["image", "text"]}, "image output is not supported"),
    ],
)
async def test_what_can_not_be_given_is_refused(
    serve: Serve, http: ClientSession, path: str, fields: dict[str, Any], message: str
) -> None:
    service = text_service()
    url = await serve(parts(service, TOOL_MODEL)) + path
    async with http.post(url, json={**ASKS[path], **fields}) as answer:
        assert answer.status == 400 and message in await answer.text()
    assert not service.asks


@pytest.mark.parametrize("thread", [{"type": "create"}, {"type": "continue", "previous_message_id": "msg_1"}])
async def test_clients_learn_that_there_are_no_threads(
    serve: Serve, http: ClientSession, thread: dict[str, Any]
) -> None:
    """After this error the tool runner of Anthropic's SDK sends all messages, without a thread."""
    url = await serve(parts(text_service(), TOOL_MODEL))
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        async with http.post(url + path, json={**MESSAGES, "thread": thread}) as answer:
            error = (await answer.json())["error"]
        assert answer.status == 400 and "send all messages" in error["message"]
        assert error["details"] == {"error_code": "thread_unsupported_request"}
    async with http.post(f"{url}/v1/messages", json={**MESSAGES, "model": ""}) as answer:
        assert "details" not in (await answer.json())["error"]


def test_thinking_between_tools_is_off_and_effort_counts_in_the_prompt() -> None:
    ask = msgspec.convert({**MESSAGES, "thinking": {"type": "between_tools"}}, Messages)
    assert messages_body(ask, TOOL_MODEL)["reasoning_effort"] == "none"
    counted = {
        "model": "demo",
        "messages": [USER],
        "thinking": {"type": "adaptive"},
        "output_config": {"effort": "low"},
    }
    assert prompt_body(msgspec.convert(counted, Tokens), TOOL_MODEL)["reasoning_effort"] == "low"


def _inputs(*items: dict[str, Any]) -> list[dict[str, Any]]:
    return input_messages([{"role": "user", "content": "go"}, *items], TOOL_MODEL)[1:]


def test_results_of_calls_need_no_call_id_if_they_name_the_function() -> None:
    calls = [
        {"type": "function_call", "call_id": f"c{name}", "name": name, "arguments": "{}"}
        for name in ("get", "put")
    ]
    result = {"type": "function_call_output", "output": "noon", "name": "put"}
    assert [message["tool_call_id"] for message in _inputs(*calls, result)[1:]] == ["cput"]
    with pytest.raises(Refusal, match="needs a call_id or a name"):
        _inputs(*calls, {"type": "function_call_output", "output": "noon"})


def test_the_result_of_a_local_shell_has_the_id_of_its_call() -> None:
    call = {"type": "local_shell_call", "id": "lsh_1", "action": {"command": ["ls"]}, "status": "completed"}
    result = {"type": "local_shell_call_output", "id": "c2", "output": "a.py"}
    asked, answered = _inputs({**call, "call_id": "c2"}, result)
    assert asked["tool_calls"][0]["id"] == answered["tool_call_id"] == "c2" and answered["content"] == "a.py"


def test_a_failed_patch_without_output_is_shown_as_failed() -> None:
    result = {"type": "apply_patch_call_output", "call_id": "c", "status": "failed"}
    assert _inputs(result)[0]["content"] == "failed"
    assert _inputs({**result, "output": "no such file"})[0]["content"] == "no such file"
    assert _inputs({**result, "status": "completed"})[0]["content"] == ""


def test_the_screenshot_of_a_computer_is_an_image() -> None:
    output = {"type": "computer_screenshot", "image_url": "data:image/png;base64,iVBORw0KGgo="}
    item = {"type": "computer_call_output", "call_id": "c", "output": output}
    assert _inputs(item)[0]["content"] == UNSEEN_IMAGE
    seen = input_messages([item], model(capabilities=("completion", "vision")))
    assert seen[0]["content"][0]["type"] == "image_url"


async def test_calls_that_ran_at_openai_are_left_out_with_a_warning(
    serve: Serve, http: ClientSession
) -> None:
    url = await serve(parts(text_service(), TOOL_MODEL)) + "/v1/responses"
    items = [
        {"type": "code_interpreter_call", "id": "ci_1", "code": "1+1", "outputs": [{"logs": "2"}]},
        {"type": "file_search_call", "id": "fs_1", "queries": ["x"], "results": [{"text": "found"}]},
        {"type": "tool_search_call", "execution": "server", "arguments": {}},
        {"type": "mcp_call", "id": "mcp_1"},
    ]
    async with http.post(url, json={"model": "demo", "input": [USER, *items]}) as answer:
        assert answer.status == 200
        warned = answer.headers["X-Sollold-Warning"]
    assert warned.startswith(
        "items of type code_interpreter_call, file_search_call ran at OpenAI and are left"
    )
    assert warned.count("left out") == 2 and "MCP servers" in warned


def test_items_of_the_input_change_the_effort_and_the_format() -> None:
    def update(**fields: Any) -> dict[str, Any]:
        return {"type": "configuration_update", **fields}

    shape = {"type": "json_schema", "name": "a", "schema": {"type": "object"}}
    request: dict[str, Any] = {"model": "demo", "input": [USER], "reasoning": {"effort": "high"}}
    request["input"] += [update(reasoning={"effort": "low"}), update(text={"format": shape}), USER]
    ask = msgspec.convert(request, ResponseAsk)
    body = response_body(ask, TOOL_MODEL)
    assert body["reasoning_effort"] == "low" and body["response_format"]["type"] == "json_schema"
    assert body["messages"] == [USER, USER] and response_warnings(request, ask) == ()
    request["input"].append(update(reasoning={"effort": "none"}, text={"format": {"type": "text"}}))
    body = response_body(msgspec.convert(request, ResponseAsk), TOOL_MODEL)
    assert body["reasoning_effort"] == "none" and "response_format" not in body
