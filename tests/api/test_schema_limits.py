"""Limits of schemas: conversion time, length in the prompt, size for the engine, length of warnings."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from typing import Any

import pytest
from aiohttp import ClientSession

from sollold.api.engine.prepare import prepare_chat, prepare_format
from sollold.api.engine.protect import protected
from sollold.api.grammar.schema import convert_schema
from sollold.api.grammar.schema_width import SchemaWidth, TooWide, check_schema
from sollold.errors import Refusal
from sollold.serving.request import Call, Engine
from tests.api.api_parts import ScriptedService, call_of, chunk, model, parts, usage_chunk
from tests.api.conftest import Serve
from tests.api.dialects import body_of, tools_of
from tests.api.test_schema_rewrite import INTEGER, STRING, Schema, object_schema, unenforced_keywords


def doubling(depth: int) -> Schema:
    """A schema in which each definition refers to the next one twice."""
    defs = {
        f"d{n}": {
            **object_schema(
                a={"$ref": f"#/$defs/d{n + 1}", "maxProperties": 9},
                b={"$ref": f"#/$defs/d{n + 1}", "minProperties": 1},
            )
        }
        for n in range(depth)
    }
    return {"$ref": "#/$defs/d0", "minProperties": 1, "$defs": {**defs, f"d{depth}": object_schema()}}


HOSTILE = {
    "choices times choices": {"allOf": [{"anyOf": [{"minLength": n} for n in range(40)]} for _ in range(40)]},
    "choices within choices": {
        "type": "object",
        "anyOf": [{"$ref": "#/$defs/l0"}],
        "required": ["a"],
        "$defs": {f"l{n}": {"anyOf": [{"$ref": f"#/$defs/l{(n + 1) % 30}"}] * 4} for n in range(30)},
    },
    "circular references": {
        "$ref": "#/$defs/A",
        "maxLength": 3,
        "$defs": {"A": {"$ref": "#/$defs/B", "minLength": 1}, "B": {"$ref": "#/$defs/A", "type": "string"}},
    },
    "itself": {"$ref": "#", "type": "object", "allOf": [{"$ref": "#"}]},
    "two recursive schemas": {
        "allOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}],
        "$defs": {
            name: object_schema(**{name.lower(): STRING}, n={"$ref": f"#/$defs/{name}"})
            for name in ("A", "B")
        },
    },
    "doubling": doubling(30),
    "many values": {"enum": [{"a": [n]} for n in range(20_000)], "properties": {"a": {"items": INTEGER}}},
    "many dependent names": {
        **object_schema(**{f"p{n}": STRING for n in range(60)}),
        "dependentRequired": {f"p{n}": [f"p{n + 1}"] for n in range(59)},
    },
    "a large multiple": {"type": "integer", "multipleOf": 3, "minimum": 0, "maximum": 10**300},
    "many prefixItems": {"type": "array", "prefixItems": [STRING], "minItems": 10**9},
    "large numbers": {
        "type": "integer",
        "minimum": -(10**400),
        "maximum": 10**400,
        "multipleOf": 7 * 10**399,
    },
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_schema_takes_bounded_time_and_space(case: str) -> None:
    schema = HOSTILE[case]
    size = len(json.dumps(schema))
    durations = []
    for _ in range(3):
        began = time.thread_time()
        converted = convert_schema(schema)
        unenforced = unenforced_keywords(converted)
        durations.append(time.thread_time() - began)
    assert min(durations) < 0.2 and len(json.dumps(converted.schema)) < 20 * size + 200_000
    assert unenforced or case in ("a large multiple", "large numbers")


def test_tools_share_one_conversion_budget() -> None:
    tools = [
        {
            "type": "function",
            "function": {"name": f"f{n}", "parameters": {**doubling(8), "$ref": "#/$defs/d1"}},
        }
        for n in range(100)
    ]
    body = {"messages": [{"role": "user", "content": "a"}], "tools": tools}
    began = time.thread_time()
    warnings = prepare_chat(body).warnings
    assert time.thread_time() - began < 1 and any("too large" in warning for warning in warnings)


def test_rewriting_a_tool_does_not_make_the_prompt_much_longer() -> None:
    many = {f"p{n}": {"type": "string", "description": "Something."} for n in range(40)}
    for inner, keyword in (
        (
            {**object_schema(**many), "minProperties": 1, "dependentRequired": {"p1": ["p2"], "p3": ["p4"]}},
            "minProperties",
        ),
        ({"type": "string", "format": "uri"}, "format"),
    ):
        schema = object_schema(a=inner)
        function = {"name": "f", "parameters": schema}
        tools: list[dict[str, Any]] = [{"type": "function", "function": function}]
        body = {"messages": [{"role": "user", "content": "a"}], "tools": tools}
        warnings = prepare_chat(body).warnings
        sent = body["tools"][0]["function"]["parameters"]
        assert len(json.dumps(sent)) < 3 * len(json.dumps(schema)) + 1000
        assert any(f'"{keyword}" at /properties/a' in warning for warning in warnings)


def test_rewriting_does_not_exceed_the_engines_limits() -> None:
    """Rewriting must not enlarge a schema beyond the engine's limits."""
    texts = object_schema(**{f"p{n}": {"type": "string", "format": "uri-reference"} for n in range(200)})
    wide = {
        **object_schema(**{f"p{n}": STRING for n in range(300)}, kind={"enum": [*"abcdefgh"]}),
        "allOf": [
            {
                "if": {"properties": {"kind": {"const": kind}}, "required": ["kind"]},
                "then": {"required": ["p1"]},
            }
            for kind in "abcd"
        ],
    }
    for schema, keyword in ((texts, "format"), (wide, "schema")):
        body = {"json_schema": schema}
        assert any(f'"{keyword}" at' in warning for warning in prepare_format(body))
        check_schema(body["json_schema"])


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses", "/api/chat"])
async def test_tools_beyond_the_total_limit_are_not_enforced(
    serve: Serve, http: ClientSession, path: str
) -> None:
    """Agents with several MCP servers offer many tools; refusing them would end the conversation."""
    schema = object_schema(**{f"p{n}": {"enum": [f"v{m}" for m in range(50)]} for n in range(10)})
    tools = [
        {"type": "function", "function": {"name": f"t{n}", "description": "Does.", "parameters": schema}}
        for n in range(9)
    ]
    service = ScriptedService(chunk("ok"), chunk(finish="stop"), usage_chunk())
    url = await serve(parts(service, model(capabilities=("completion", "tools"))))
    messages = [{"role": "user", "content": "go"}]
    body = body_of(path, "demo", messages, stream=True, tools=tools_of(path, *tools))
    async with http.post(url + path, json=body) as answer:
        assert answer.status == 200, await answer.text()
        assert 'tool "t8": not enforced: the schemas of all tools' in answer.headers["X-Sollold-Warning"]
    sent = [function["function"] for function in call_of(service).body["tools"]]
    assert ["properties" in function["parameters"] for function in sent] == [True] * 4 + [False] * 5
    assert sent[8]["description"].startswith("Does.\nArguments (JSON schema):") and "v49" in str(sent[8])
    sent_to_ollama = call_of(service, Engine.OLLAMA).body["tools"]
    assert all("properties" in tool["function"]["parameters"] for tool in sent_to_ollama)


def test_a_tool_over_the_limit_does_not_use_up_the_total() -> None:
    width = SchemaWidth()
    width.add({"enum": [*range(1500)]})
    for _ in range(2):
        with pytest.raises(TooWide):
            width.add({"enum": [*range(600)]})
        width.add({"enum": [*range(200)]})
    with pytest.raises(TooWide):
        width.add({"enum": [*range(200)]})


def test_the_schemas_of_tools_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[object] = []
    add = SchemaWidth.add

    def counted(self: SchemaWidth, value: object) -> None:
        measured.append(value)
        add(self, value)

    monkeypatch.setattr(SchemaWidth, "add", counted)
    tools = [{"type": "function", "function": {"name": f"t{n}", "parameters": STRING}} for n in range(3)]
    body = {"messages": [{"role": "user", "content": "go"}], "tools": tools}
    prepare_chat(body)
    calls = protected({Engine.LLAMA: Call("/v1/chat/completions", body)})
    assert len(measured) == 3
    # They are measured again if they were changed since.
    body["tools"] = [*calls[Engine.LLAMA].body["tools"], object_schema(a={"enum": [*range(3000)]})]
    with pytest.raises(Refusal, match="an engine would hang on the schema in tools"):
        protected({Engine.LLAMA: Call("/v1/chat/completions", body)})


def test_warnings_are_limited() -> None:
    bounded = object_schema(**{f"p{n}": {"type": "number", "minimum": 1} for n in range(300)})
    body = {
        "messages": [{"role": "user", "content": "a"}],
        "tools": [
            {"type": "function", "function": {"name": f"f{n}", "parameters": bounded}} for n in range(50)
        ],
        "json_schema": object_schema(**{"x" * 10_000: {"type": "array", "uniqueItems": True}}),
    }
    warnings = prepare_chat(body).warnings
    assert len(warnings) == 10 and all(len(warning) < 300 for warning in warnings)
    assert warnings[0].startswith('tool "f0": not enforced: "minimum" at /properties/p0: for numbers')
    assert warnings[0].endswith(" and 296 more") and " 42 more tools" in warnings[8]
    assert warnings[9].startswith('format: not enforced: "uniqueItems" at ...x')


def wide_object(count: int, **further: Any) -> Schema:
    return {
        **object_schema(**{f"p{n}": STRING for n in range(count)}),
        "additionalProperties": False,
        **further,
    }


VAST = {
    "properties": wide_object(200_000),
    "values": {"type": "string", "enum": [*range(200_000)]},
    "names": object_schema(a={"type": "object", "required": [f"p{n}" for n in range(200_000)]}),
    "required properties": wide_object(
        18_000, required=[f"p{n}" for n in range(17_000)], minProperties=17_500
    ),
    "denied properties": object_schema(a=STRING, **{f"p{n}": False for n in range(18_000)}),
    "patterns": {
        "type": "array",
        "prefixItems": [{"type": "string", "pattern": "^" + "(a|b)" * 390 + "$"}] * 3000,
    },
}


@pytest.mark.parametrize("case", VAST)
def test_a_huge_schema_takes_bounded_time(case: str) -> None:
    for body in (
        {"json_schema": VAST[case], "messages": [{"role": "user", "content": "a"}]},
        {
            "messages": [{"role": "user", "content": "a"}],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": VAST[case]}}],
        },
    ):
        began = time.thread_time()
        with suppress(Refusal):
            prepare_chat(body)
        # Usually at most 0.2 s; without limits several seconds or more.
        assert time.thread_time() - began < 1.5


@pytest.mark.parametrize(
    "definitions",
    [
        {"A": {"$ref": "#/$defs/A"}},
        {"A": {"allOf": [{"$ref": "#/$defs/A/allOf/0"}]}},
        {"A": {"allOf": [{"$ref": "#/$defs/A/allOf/ +00x"}]}},
        {"A": {"allOf": [{"$ref": "#/$defs/B"}]}, "B": {"allOf": [{"$ref": "#/$defs/A"}, INTEGER]}},
        {f"A{n or ''}": {"$ref": f"#/$defs/A{n + 1}"} for n in range(1000)},
    ],
    ids=["itself", "an index", "an odd index", "another", "far"],
)
def test_endless_references_are_refused(definitions: Schema) -> None:
    schema = {**object_schema(b={"allOf": [{"$ref": "#/$defs/A"}, INTEGER]}), "$defs": definitions}
    with pytest.raises(TooWide):
        check_schema(schema)


@pytest.mark.parametrize("index", ["0", "000000000000", "0th"])
def test_choices_behind_an_index_are_counted(index: str) -> None:
    defs = {"e": {"anyOf": [{"enum": list(range(1900))}]}}
    schema = {"anyOf": [{"$ref": f"#/$defs/e/anyOf/{index}"}] * 2, "$defs": defs}
    with pytest.raises(TooWide, match="choices"):
        check_schema(schema)


def test_recursive_schemas_are_accepted() -> None:
    node = object_schema(
        next={"allOf": [{"$ref": "#/$defs/A"}]}, more={"type": "array", "items": {"$ref": "#/$defs/A"}}
    )
    check_schema({"allOf": [{"$ref": "#/$defs/A"}], "$defs": {"A": node}})
