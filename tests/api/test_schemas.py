"""Schemas and patterns that llama.cpp can't convert, in tools and in formats, in every dialect."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from aiohttp import ClientSession
from hypothesis import example, given
from hypothesis import strategies as st

from sollold.api.engine.prepare import prepare_chat
from sollold.api.grammar.pattern import Unsupported, convertible_pattern
from sollold.api.grammar.schema import convert_schema
from sollold.api.grammar.unenforced import unenforced
from sollold.errors import Fault, Refusal
from tests.api.api_parts import ScriptedService, call_of, chunk, model, parts, usage_chunk
from tests.api.conftest import Serve
from tests.api.dialects import PATHS, body_of, error_of, post, tools_of

USER = [{"role": "user", "content": "What time is it?"}]


def of(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


EQUAL = {
    "type any": (of(a={"type": "any"}), of(a={})),
    "properties null": ({"type": "object", "properties": None, "required": None}, of()),
    "properties an empty list": ({"type": "object", "properties": []}, of()),
    "other names of types": (
        of(a={"type": "int"}, b={"type": "float"}, c={"type": "STRING"}, d={"type": ["Str", "None"]}),
        of(a={"type": "integer"}, b={"type": "number"}, c={"type": "string"}, d={"type": ["string", "null"]}),
    ),
    "true and false": (of(a=True, b=False), {**of(a={}), "additionalProperties": False}),
    "a type's name": (of(a="string"), of(a={"type": "string"})),
    "no value in an enum": (of(a={"type": "string", "enum": []}), of(a={"type": "string"})),
    "nullable": (
        of(a={"type": "string", "enum": ["x"], "nullable": True}),
        of(a={"type": ["string", "null"], "enum": ["x", None]}),
    ),
    "numbers as texts": (
        of(a={"type": "string", "minLength": "1", "maxLength": 5.0}),
        of(a={"type": "string", "minLength": 1, "maxLength": 5}),
    ),
    "the bounds of draft 4": (
        of(a={"type": "integer", "minimum": 3, "exclusiveMinimum": True}),
        of(a={"type": "integer", "exclusiveMinimum": 3}),
    ),
    "required as in draft 3": (
        of(a={"type": "string", "required": True}, b={}),
        {**of(a={"type": "string"}, b={}), "required": ["a"]},
    ),
    "nulls": (
        {**of(a={"type": "array", "items": None}), "additionalProperties": None, "$defs": None},
        of(a={"type": "array"}),
    ),
    "no alternative": (of(a={"anyOf": [], "type": "string"}), of(a={"type": "string"})),
    "a name of a definition": (
        {**of(a={"$ref": "#Node"}), "$defs": {"Node": {"type": "string"}}},
        {**of(a={"$ref": "#/$defs/Node"}), "$defs": {"Node": {"type": "string"}}},
    ),
    "allOf around one reference": (
        {**of(a={"allOf": [{"$ref": "#/$defs/C"}], "default": "x"}), "$defs": {"C": {"enum": ["x"]}}},
        {**of(a={"$ref": "#/$defs/C", "default": "x"}), "$defs": {"C": {"enum": ["x"]}}},
    ),
    "allOf of constraints": (
        of(a={"allOf": [{"type": ["string", "null"]}, {"type": "string", "minLength": 2}, {"title": "t"}]}),
        of(a={"type": "string", "minLength": 2}),
    ),
    "allOf of objects": (
        {"allOf": [of(a={"type": "int"}), {**of(b={}), "required": ["b"]}], "required": ["a"]},
        {**of(a={"type": "integer"}, b={}), "required": ["a", "b"]},
    ),
    "required without a schema": ({**of(a={}), "required": ["b"]}, {**of(a={}, b={}), "required": ["b"]}),
    "a reference in percent": (
        {**of(a={"$ref": "#/$defs/A%20B"}), "$defs": {"A B": {"type": "int"}}},
        {
            **of(a={"$ref": "#/$defs/root_1"}),
            "$defs": {"A B": {"type": "integer"}, "root_1": {"type": "integer"}},
        },
    ),
    "an anchor": (
        {**of(a={"$ref": "#c"}), "$defs": {"C": {"$anchor": "c", "type": "int"}}},
        {
            **of(a={"$ref": "#/$defs/root_1"}),
            "$defs": {key: {"$anchor": "c", "type": "integer"} for key in ("C", "root_1")},
        },
    ),
    "a whole reference": (
        {"$id": "http://x/s", **of(a={"$ref": "http://x/s#/$defs/A"}), "$defs": {"A": {"type": "string"}}},
        {"$id": "http://x/s", **of(a={"$ref": "#/$defs/A"}), "$defs": {"A": {"type": "string"}}},
    ),
}


@pytest.mark.parametrize("case", EQUAL)
def test_what_has_an_equal_form_is_rewritten(case: str) -> None:
    before, after = EQUAL[case]
    copy = json.loads(json.dumps(before))
    converted = convert_schema(before)
    assert converted.schema == after and not converted.problems
    assert before == copy


def test_a_reference_to_the_root_becomes_one_to_a_definition() -> None:
    tree = of(name={"type": "string"}, children={"type": "array", "items": {"$ref": "#"}})
    converted = convert_schema(tree)
    node = of(name={"type": "string"}, children={"type": "array", "items": {"$ref": "#/$defs/root"}})
    assert converted.schema == {**node, "$defs": {"root": node}} and not converted.problems
    taken = {**tree, "$defs": {"root": {"type": "string"}}}
    assert convert_schema(taken).schema["$defs"].keys() == {"root", "root_"}


BROKEN = {
    "an unknown type": (of(a={"type": "spam"}), "/properties/a", "type"),
    "an unresolved reference": (of(a={"$ref": "#/$defs/no"}), "/properties/a", "$ref"),
    "a reference elsewhere": (of(a={"$ref": "http://x/y"}), "/properties/a", "$ref"),
    "a look-around": (of(a={"type": "string", "pattern": "^(?=a)b$"}), "/properties/a", "pattern"),
    "properties that are a text": ({"type": "object", "properties": "x"}, "", "properties"),
    "a bound that is none": (
        of(**{"a/b": {"type": "integer", "minimum": "x"}}),
        "/properties/a~1b",
        "minimum",
    ),
    "a number for a schema": (of(a=5), "/properties/a", "schema"),
    "allOf that is no one schema": (
        of(a={"allOf": [{"pattern": "^a$"}, {"pattern": "^b$"}]}),
        "/properties/a",
        "allOf",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_has_none_is_left_free_and_named_with_its_place(case: str) -> None:
    schema, pointer, keyword = BROKEN[case]
    (problem,) = convert_schema(schema).problems
    assert (problem.pointer, problem.keyword) == (pointer, keyword)


@pytest.mark.llama
@pytest.mark.parametrize("path", PATHS)
async def test_llama_cpp_takes_a_tool_with_any_of_them(real: str, http: ClientSession, path: str) -> None:
    for number, schema in enumerate(
        [*(one for one, _ in EQUAL.values()), *(one[0] for one in BROKEN.values())]
    ):
        function = {"name": "get_time", "description": None, "parameters": schema}
        tools = tools_of(path, {"type": "function", "function": function})
        status, answer, headers = await post(http, real + path, body_of(path, "call", USER, tools=tools))
        assert status == 200, (schema, answer)
        warned = number >= len(EQUAL)
        assert ('tool "get_time": not enforced' in headers.get("X-Sollold-Warning", "")) == warned
        if path == "/api/chat" and warned:
            assert "not enforced" in answer["_routing"]["warnings"][0]


def formatted(path: str, schema: Any, *, strict: bool) -> dict[str, Any]:
    """The fields that ask ``path`` for a format."""
    if path == "/api/chat":
        return {"format": schema}
    if path == "/v1/messages":
        return {"output_config": {"format": {"type": "json_schema", "schema": schema}}}
    named = {"name": "x", "schema": schema, "strict": strict}
    if path == "/v1/responses":
        return {"text": {"format": {"type": "json_schema", **named}}}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


@pytest.mark.llama
@pytest.mark.parametrize("path", PATHS)
async def test_llama_cpp_takes_a_format_with_any_equal_form(
    real: str, http: ClientSession, path: str
) -> None:
    for schema, _ in EQUAL.values():
        body = body_of(path, "demo", USER, **formatted(path, schema, strict=True))
        status, answer, _ = await post(http, real + path, body)
        assert status == 200, (schema, answer)


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("path", PATHS)
async def test_a_strict_format_is_refused_with_the_keyword_and_its_place(
    serve: Serve, http: ClientSession, path: str, case: str
) -> None:
    service = ScriptedService(chunk("{}"), chunk(finish="stop"), usage_chunk())
    url = await serve(parts(service))
    schema, pointer, keyword = BROKEN[case]
    body = body_of(path, "demo", USER, **formatted(path, schema, strict=True), stream=True)
    async with http.post(url + path, json=body) as answer:
        if path == "/api/chat":
            # Ollama's format is not called strict: it is answered, and told.
            assert (
                answer.status == 200
                and f'"{keyword}" at {pointer or "/"}' in answer.headers["X-Sollold-Warning"]
            )
            return
        assert answer.status == 400
        assert f'"{keyword}" at {pointer or "/"}' in error_of(path, await answer.json())
    assert not service.asks
    if path != "/v1/messages":
        body |= formatted(path, schema, strict=False)
        async with http.post(url + path, json=body) as answer:
            assert answer.status == 200 and f'"{keyword}" at' in answer.headers["X-Sollold-Warning"]


def test_what_llama_cpp_overlooks_is_told() -> None:
    schema = of(a={"type": "array", "items": {"type": "number", "minimum": 1}, "uniqueItems": True})
    found = [(one.pointer, one.keyword) for one in unenforced(convert_schema(schema).schema)]
    assert found == [("/properties/a", "uniqueItems"), ("/properties/a/items", "minimum")]
    schema = of(a={"type": "string", "pattern": "^(a|bc)+$", "minLength": 2})
    assert [one.keyword for one in unenforced(convert_schema(schema).schema)] == ["minLength"]


@pytest.mark.parametrize(
    ("schema", "sent", "keyword"),
    [
        ({"type": "string"}, {"type": "object"}, "type"),
        ({"type": ["object", "null"]}, {"type": "object"}, ""),
        ({"properties": {"a": {"not": {}}}}, of(a={"not": {}}), "not"),
    ],
)
def test_the_arguments_of_a_tool_are_an_object(schema: Any, sent: Any, keyword: str) -> None:
    body = {
        "messages": USER,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}],
    }
    warnings = prepare_chat(body).warnings
    assert body["tools"][0]["function"]["parameters"] == sent
    assert [f'"{keyword}"' in warning for warning in warnings] == ([True] if keyword else [])


@pytest.mark.parametrize("path", PATHS)
async def test_a_schema_that_llama_cpp_refuses_all_the_same_is_not_enforced(
    serve: Serve, http: ClientSession, path: str
) -> None:
    class Refusing(ScriptedService):
        async def open(self, ask: Any, on_wait: Any) -> Any:
            sent = json.dumps(ask.calls["llama"].body["tools"][0]["function"]["parameters"])
            why = "Automatic parser generation failed: JSON schema error at #/properties/a: odd"
            self.refusal = Refusal(Fault.ENGINE, why, status=400) if "odd" in sent else None
            return await super().open(ask, on_wait)

    service = Refusing(chunk("a"), chunk(finish="stop"), usage_chunk())
    able = model(capabilities=("completion", "tools"))
    url = await serve(parts(service, able))
    function = {"name": "get", "description": "Gets.", "parameters": of(a={"odd": 1})}
    tools = tools_of(path, {"type": "function", "function": function})
    async with http.post(url + path, json=body_of(path, "demo", USER, tools=tools, stream=True)) as answer:
        assert answer.status == 200 and "not enforced" in answer.headers["X-Sollold-Warning"]
    (sent,) = call_of(service).body["tools"]
    assert sent["function"]["parameters"] == {"type": "object"}
    assert sent["function"]["description"].startswith("Gets.\nArguments (JSON schema): {")


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        (r"^\d{3}$", "123", "12a"),
        (r"^\w+$", "a_1", "a-b"),
        (r"^\s$", " ", "x"),
        ("ab+", "xxabby", "a"),
        ("^ab", "abc", "cab"),
        ("ab$", "cab", "abc"),
        ("^a|b$", "ac", "ca"),
        (r"^[\w.-]+@\S+$", "a.b@c", "a b@c"),
        (r"^(?<year>\d+)-(?:a|b)*?$", "12-ab", "12-c"),
        (r"^\u00e9+$", "éé", "e"),
        (r"^é{2}$", "éé", "é"),
        (r"^\D\W\S$", "a-b", "1-b"),
        (r"^[^\s\"]+$", "ab", "a b"),
        ("^.*$", "anything", 'a"b'),
        (r"^\[\]\{\}$", "[]{}", "[]"),
        (r"^[a-z0-9_\.\+\-]+$", "a.b+c-d", "a@b"),
        (r"^[\^\$]+$", "^$", "a"),
        (r"^v1\.?$", "v1", "1"),
    ],
)
def test_patterns_keep_their_meaning(pattern: str, good: str, bad: str) -> None:
    converted = convertible_pattern(pattern)
    assert converted.startswith("^") and converted.endswith("$")
    assert re.fullmatch(converted[1:-1], good) and not re.fullmatch(converted[1:-1], bad)


@pytest.mark.parametrize(
    "pattern",
    [
        "^(?=a)b$",
        r"^\p{L}$",
        r"^\bfoo$",
        r"^(a)\1$",
        "(^a$)",
        "^(?i)a$",
        '^"$',
        "^[$",
        "^(a$",
        "*",
        "^[[:alpha:]]$",
        "^a{1,99999}$",
        "(" * 500 + ")" * 500,
        "a" * 5000,
        "\\",
    ],
)
def test_patterns_without_a_grammar_are_named(pattern: str) -> None:
    with pytest.raises(Unsupported):
        convertible_pattern(pattern)


_TIMES = r"(?:[*+?]|\{\d+(?:,\d*)?\})"
_CLASS = r"\[(?:[^\]\\]|\\[\[\]\\-]|\\x[0-9A-F]{2})*\]"
_ESCAPED = rf"\\[\^$.\[\](){{}}|*+?](?!{_TIMES})"
_LETTER = r"(?![\\\[\](){}|*+?^$.])[ -~]"
_READ = re.compile(rf"\^(?:{_CLASS}{_TIMES}?|{_ESCAPED}|{_LETTER}{_TIMES}?|\((?!\?)|\||\){_TIMES}?)*\$")


@given(st.text(r"ab^$.[](){}|*+?\dwsDux0e9é-", max_size=10))
@example(r"^[a\.\^]+$")
@example(r"^v1\.?$")
@example(r"^\u00e9{2}$")
def test_a_converted_pattern_has_only_what_llama_cpp_reads(pattern: str) -> None:
    """It drops a pattern with another escape in a class, repeats all letters before an escaped one with it,
    and of a letter that is no ASCII the last byte alone.
    """
    try:
        converted = convertible_pattern(pattern)
    except Unsupported:
        return
    assert _READ.fullmatch(converted), converted


@given(st.text(r"ab^$.[](){}|*+?\dwsDWSux01-,:<>=!", max_size=14), st.text('ab01 -"\\\n', max_size=4))
def test_a_converted_pattern_matches_nothing_more(pattern: str, text: str) -> None:
    try:
        converted = convertible_pattern(pattern)
        before, after = re.compile(pattern), re.compile(converted[1:-1])
    except (Unsupported, re.error):
        return
    if after.fullmatch(text):
        assert before.search(text) and json.loads(f'"{text}"') == text


KEYWORDS = [
    *("type", "properties", "items", "$ref", "enum", "anyOf", "required", "pattern", "minLength"),
    *("nullable", "additionalProperties", "a"),
]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYWORDS), inner, max_size=4),
    max_leaves=15,
)


@given(VALUES)
def test_anything_for_a_schema_is_converted(value: Any) -> None:
    converted = convert_schema(value)
    assert isinstance(converted.schema, dict)
    again = convert_schema(converted.schema)
    assert not [one for one in again.problems if one.keyword not in ("$ref", "pattern")]
    list(unenforced(converted.schema))
