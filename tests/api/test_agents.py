"""Requests as Claude Code, Codex and opencode send them, with all their unusual fields."""

from __future__ import annotations

import json
from typing import Any

import pytest
from aiohttp import ClientSession

from tests.api.api_parts import ScriptedService, call_of, chunk, model, parts, usage_chunk
from tests.api.conftest import Serve
from tests.api.dialects import post

TOOL_MODEL = model(capabilities=("completion", "tools"))
DRAFT = "http://json-schema.org/draft-07/schema#"
CACHED = {"type": "ephemeral", "ttl": "1h"}
READ = {
    "name": "Read",
    "description": "Reads a file.",
    "input_schema": {
        "$schema": DRAFT,
        "type": "object",
        "properties": {
            "file_path": {"type": "string", "description": "The file"},
            "offset": {"type": "integer", "minimum": 0, "maximum": 9007199254740991},
            "pages": {"type": "string", "pattern": "^\\d+(-\\d+)?$"},
        },
        "required": ["file_path"],
        "additionalProperties": False,
    },
    "cache_control": CACHED,
}
CLAUDE_CODE: dict[str, Any] = {
    "model": "demo",
    "max_tokens": 32000,
    "stream": True,
    "temperature": 1,
    "metadata": {"user_id": "user_0_account__session_1"},
    "thinking": {"type": "adaptive", "display": "omitted"},
    "output_config": {"effort": "medium"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2"},
        {"type": "text", "text": "You are Claude Code.", "cache_control": CACHED},
    ],
    "tools": [READ, {"name": "TaskList", "description": "", "input_schema": None, "defer_loading": True}],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": False},
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "<system-reminder>Be kind.</system-reminder>"},
                {"type": "text", "text": "Read it.", "cache_control": CACHED},
            ],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "redacted_thinking", "data": "…"},
                {
                    "type": "server_tool_use",
                    "id": "srvtoolu_1",
                    "name": "web_search",
                    "input": {"query": "x"},
                },
                {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": []},
                {"type": "text", "text": "I read."},
                {"type": "tool_use", "id": "toolu_1", "name": "Read", "input": {"file_path": "a"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_1",
                    "is_error": False,
                    "content": [
                        {"type": "text", "text": "1 line"},
                        {"type": "tool_reference", "tool_name": "Grep"},
                        {
                            "type": "search_result",
                            "title": "T",
                            "source": "S",
                            "content": [{"type": "text", "text": "found"}],
                        },
                    ],
                    "cache_control": CACHED,
                },
                {
                    "type": "document",
                    "source": {"type": "content", "content": [{"type": "text", "text": "page"}]},
                },
            ],
        },
        {"role": "assistant", "content": None},
        {"role": "user", "content": "And?"},
        # Claude Code sends facts about the machine last, with the role `system`.
        {"role": "system", "content": [{"type": "text", "text": "It is Linux.", "cache_control": CACHED}]},
    ],
}
CODEX: dict[str, Any] = {
    "model": "demo",
    "instructions": "You are Codex.",
    "input": [
        {
            "type": "message",
            "id": "msg_00000000-0000-5000-8000-000000000000",
            "role": "developer",
            "content": [{"type": "input_text", "text": "<permissions>"}],
        },
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Fix it."}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": None, "encrypted_content": "gAAA"},
        {"type": "function_call", "call_id": "c1", "name": "shell", "arguments": '{"command":["ls"]}'},
        {"type": "function_call_output", "call_id": "c1", "output": "a.py"},
        {
            "type": "local_shell_call",
            "call_id": "c2",
            "status": "completed",
            "action": {"type": "exec", "command": ["ls"]},
        },
        {"type": "local_shell_call_output", "call_id": "c2", "output": {"output": "b.py"}},
        {"type": "ghost_snapshot_call", "ghost_commit": {"id": "0"}},
        {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Go on."}]},
    ],
    "tools": [
        {"type": "function", "name": "shell", "strict": False, "parameters": {"type": "object"}},
        {"type": "custom", "name": "apply_patch", "format": {"type": "grammar", "syntax": "lark"}},
        {
            "type": "namespace",
            "name": "agents",
            "description": "Of helpers.",
            "tools": [
                {"type": "function", "name": "wait", "strict": False, "parameters": {"type": "object"}}
            ],
        },
        {"type": "web_search", "external_web_access": False},
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning": {"effort": "medium", "summary": "auto"},
    "text": {"verbosity": "medium"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "0",
    "client_metadata": {"session": "0"},
}
OPENCODE: dict[str, Any] = {
    "model": "demo",
    "max_tokens": 32000,
    "stream": True,
    "stream_options": {"include_usage": True},
    "messages": [
        {"role": "system", "content": "You are opencode."},
        {"role": "system", "content": "More."},
        {"role": "user", "content": [{"type": "text", "text": "Read."}]},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "read", "arguments": "{}"}, "index": 0}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "ok"}]},
    ],
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "read",
                "description": "",
                "parameters": {"$schema": DRAFT, "type": "object", "properties": {}, "ref": "read"},
            },
        }
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": None,
    "reasoning_effort": None,
    "store": True,
    "user": "me",
}
AGENTS = {
    "/v1/messages?beta=true": CLAUDE_CODE,
    "/v1/responses": CODEX,
    "/v1/chat/completions": OPENCODE,
}


@pytest.mark.parametrize("path", AGENTS)
async def test_requests_of_agents_are_accepted(serve: Serve, http: ClientSession, path: str) -> None:
    service = ScriptedService(chunk("Hello"), chunk(finish="stop"), usage_chunk())
    url = await serve(parts(service, TOOL_MODEL))
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "claude-code-20250219,oauth-2025-04-20"}
    async with http.post(url + path, json=AGENTS[path], headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        assert "Hello" in await answer.text()
    body = call_of(service).body
    assert all(tool["type"] == "function" and tool["function"]["name"] for tool in body["tools"])
    assert all(isinstance(message["content"], (str, list)) for message in body["messages"])


@pytest.mark.llama
@pytest.mark.parametrize("path", AGENTS)
async def test_llama_cpp_answers_requests_of_agents(real: str, http: ClientSession, path: str) -> None:
    body = {**AGENTS[path], "model": "call", "stream": False}
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    status, answer, _ = await post(http, real + path, {**body, limit: 9})
    assert status == 200, answer


async def test_conversations_of_agents_reach_the_engine_complete(serve: Serve, http: ClientSession) -> None:
    service = ScriptedService(chunk("Hello"), chunk(finish="stop"), usage_chunk())
    url = await serve(parts(service, TOOL_MODEL))
    async with http.post(f"{url}/v1/messages", json=CLAUDE_CODE) as answer:
        assert answer.status == 200
    sent = [(message["role"], message["content"]) for message in call_of(service).body["messages"]]
    assert sent[1:3] == [
        ("user", "<system-reminder>Be kind.</system-reminder>\nRead it."),
        ("assistant", "I read."),
    ]
    assert sent[-2:] == [("user", "And?"), ("system", "It is Linux.")]
    assert sent[3] == ("tool", "1 line\nGrep\nT\nS\nfound") and sent[4] == ("user", "page")
    async with http.post(f"{url}/v1/responses", json=CODEX) as answer:
        assert answer.status == 200 and "web_search" in answer.headers["X-Sollold-Warning"]
    messages = call_of(service).body["messages"]
    assert messages[0] == {"role": "system", "content": "You are Codex.\n\n<permissions>"}
    calls = [call["function"] for message in messages for call in message.get("tool_calls", ())]
    assert [call["name"] for call in calls] == ["shell", "local_shell"]
    assert json.loads(calls[1]["arguments"])["command"] == ["ls"]
    assert [message["content"] for message in messages if message["role"] == "tool"] == [
        "a.py",
        '{"output":"b.py"}',
    ]
