"""Parts of a request that are small as JSON, but costly to process: they do not block the event loop."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from aiohttp import ClientSession

from sollold.api.engine.forced_tool import _call_in
from sollold.api.engine.messages import link_tool_results
from sollold.api.engine.placement import PlacementBody
from sollold.api.engine.tools import arguments_text, normalize_tools
from sollold.api.http.body import as_type
from sollold.api.ollama.generate import unpack_context
from sollold.api.ollama.request import format_of
from sollold.api.openai.constraints import with_own_constraints
from sollold.api.openai.responses_ask import ResponseAsk
from sollold.api.openai.responses_tools import add_tools
from sollold.errors import Fault, Refusal
from tests.api.api_parts import ScriptedService, model, parts
from tests.api.conftest import Serve
from tests.api.watched_loop import watched

LIMIT_SECONDS = 0.25
"""CPU time for one part; without limits these took from half a second to hours."""
MILLIONS_OF_VALUES = "[" + "{}," * 2_000_000 + "{}]"
NESTED = '{"a":' * 100_000 + "1" + "}" * 100_000


def guided(kind: str) -> Callable[[Any], Any]:
    return lambda value: with_own_constraints({f"guided_{kind}": value}, chat=True)


def tool(schema: str) -> Any:
    return normalize_tools([{"name": "f", "parameters": schema}])


SCHEMAS: list[Callable[[str], Any]] = [guided("json"), format_of, tool]


@pytest.mark.parametrize("read", SCHEMAS)
@pytest.mark.parametrize("text", [MILLIONS_OF_VALUES, NESTED], ids=["values", "nested"])
def test_a_schema_in_a_string_is_refused_if_it_is_too_large(read: Callable[[str], Any], text: str) -> None:
    started = time.thread_time()
    with pytest.raises(Refusal) as refused:
        read(text)
    assert refused.value.fault is Fault.BAD_REQUEST and time.thread_time() - started < LIMIT_SECONDS


def test_arguments_are_limited_like_a_body() -> None:
    with pytest.raises(Refusal, match="more than 20000 objects and arrays"):
        arguments_text(MILLIONS_OF_VALUES)
    assert arguments_text(NESTED).startswith('{"arguments":')
    long = '{"path": "a", "text": "' + "[x], " * 100_000 + '"}'
    assert arguments_text(long) == long


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("regex", "[" * 60_000),
        ("regex", "[" * 8_000_000),
        ("grammar", "\n" * 60_000),
        ("grammar", "\n" * 8_000_000),
        ("choice", ["a" * 8_000_000]),
    ],
)
def test_a_long_constraint_is_refused_quickly(kind: str, value: Any) -> None:
    started = time.thread_time()
    with pytest.raises(Refusal):
        guided(kind)(value)
    assert time.thread_time() - started < LIMIT_SECONDS


def test_a_grammar_may_begin_with_blank_lines() -> None:
    grammar = '\n\n  root ::= "a"'
    assert guided("grammar")(grammar)[0]["grammar"] == grammar


def test_a_long_name_of_an_unknown_field_is_refused_quickly() -> None:
    started = time.thread_time()
    with pytest.raises(Refusal, match="unknown field aaa") as refused:
        as_type({"a" * 8_000_000: 1}, PlacementBody)
    assert time.thread_time() - started < LIMIT_SECONDS and len(refused.value.message) < 2000


def test_a_forced_call_with_a_long_run_of_spaces_is_read_quickly() -> None:
    text = '{"name":"f","arguments":{"x":"' + " " * 100_000 + '"}}'
    started = time.thread_time()
    call = _call_in(text)
    assert isinstance(call, dict) and time.thread_time() - started < LIMIT_SECONDS
    assert _call_in("```\nno call \n``` ") == "no call"
    assert _call_in(" no call ") == " no call "


def test_a_context_of_hundreds_of_thousands_of_turns_is_refused() -> None:
    turns = b"[" + b'["",""],' * 900_000 + b'["",""]]'
    context = [-7301, *zlib.compress(turns, 1)]
    started = time.thread_time()
    with pytest.raises(Refusal, match="invalid context"):
        unpack_context(context)
    assert time.thread_time() - started < LIMIT_SECONDS


def test_thousands_of_calls_and_results_are_linked_quickly() -> None:
    def calls() -> dict[str, Any]:
        return {"role": "assistant", "tool_calls": [call(f"c{n}", f"f{n}") for n in range(6000)]}

    def call(id_: str, name: str) -> dict[str, Any]:
        return {"id": id_, "function": {"name": name}}

    results: list[dict[str, Any]] = [{"role": "tool", "tool_call_id": "x"} for _ in range(2000)]
    results += [{"role": "tool", "name": f"f{5999 - n}"} for n in range(2000)]
    started = time.thread_time()
    linked = link_tool_results([calls(), *results])
    assert time.thread_time() - started < LIMIT_SECONDS
    # Results without their call answer the first ones.
    assert [linked[1]["name"], linked[2000]["name"]] == ["f0", "f1999"]
    assert [message["tool_call_id"] for message in linked[2001:]] == [f"c{5999 - n}" for n in range(2000)]


async def test_one_long_text_to_embed_does_not_block_the_loop(serve: Serve, http: ClientSession) -> None:
    url = await serve(parts(ScriptedService(b'{"data": [{"embedding": [1.0], "index": 0}]}')))
    body = msgspec.json.encode({"model": "demo", "input": "a" * (8 << 20)})
    async with watched() as loop, http.post(url + "/v1/embeddings", data=body) as answer:
        assert answer.status == 200, await answer.text()
    assert loop.longest < LIMIT_SECONDS


def test_a_choice_among_thousands_of_tools_is_quick() -> None:
    tools = [{"type": "function", "name": f"f{number}", "parameters": {}} for number in range(4000)]
    allowed = [{"type": "function", "name": f"g{number}"} for number in range(9000)]
    body = {
        "input": "a",
        "tools": [{"type": "namespace", "name": "n", "tools": tools}],
        "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [*allowed, tools[1]]},
    }
    ask = as_type(body, ResponseAsk)
    started = time.thread_time()
    engine: dict[str, Any] = {}
    add_tools(engine, ask, model(capabilities=("completion", "tools")))
    assert time.thread_time() - started < LIMIT_SECONDS
    assert [tool["function"]["name"] for tool in engine["tools"]] == ["n__f1"]
