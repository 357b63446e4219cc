"""Schemas and patterns that llama.cpp can't convert, in tools and formats, in every dialect."""

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


def object_schema(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


EQUAL = {
    "type any": (object_schema(a={"type": "any"}), object_schema(a={})),
    "properties null": ({"type": "object", "properties": None, "required": None}, object_schema()),
    "properties an empty list": ({"type": "object", "properties": []}, object_schema()),
    "other names of types": (
        object_schema(
            a={"type": "int"}, b={"type": "float"}, c={"type": "STRING"}, d={"type": ["Str", "None"]}
        ),
        object_schema(
            a={"type": "integer"}, b={"type": "number"}, c={"type": "string"}, d={"type": ["string", "null"]}
        ),
    ),
    "true and false": (
        object_schema(a=True, b=False),
        {**object_schema(a={}), "additionalProperties": False},
    ),
    "a type name as a schema": (object_schema(a="string"), object_schema(a={"type": "string"})),
    "an empty enum": (
        object_schema(a={"type": "string", "enum": []}),
        object_schema(a={"type": "string"}),
    ),
    "nullable": (
        object_schema(a={"type": "string", "enum": ["x"], "nullable": True}),
        object_schema(a={"type": ["string", "null"], "enum": ["x", None]}),
    ),
    "numbers as strings": (
        object_schema(a={"type": "string", "minLength": "1", "maxLength": 5.0}),
        object_schema(a={"type": "string", "minLength": 1, "maxLength": 5}),
    ),
    "the bounds of draft 4": (
        object_schema(a={"type": "integer", "minimum": 3, "exclusiveMinimum": True}),
        object_schema(a={"type": "integer", "exclusiveMinimum": 3}),
    ),
    "required as in draft 3": (
        object_schema(a={"type": "string", "required": True}, b={}),
        {**object_schema(a={"type": "string"}, b={}), "required": ["a"]},
    ),
    "nulls": (
        {**object_schema(a={"type": "array", "items": None}), "additionalProperties": None, "$defs": None},
        object_schema(a={"type": "array"}),
    ),
    "an empty anyOf": (object_schema(a={"anyOf": [], "type": "string"}), object_schema(a={"type": "string"})),
    "a reference to a definition's name": (
        {**object_schema(a={"$ref": "#Node"}), "$defs": {"Node": {"type": "string"}}},
        {**object_schema(a={"$ref": "#/$defs/Node"}), "$defs": {"Node": {"type": "string"}}},
    ),
    "allOf around one reference": (
        {
            **object_schema(a={"allOf": [{"$ref": "#/$defs/C"}], "default": "x"}),
            "$defs": {"C": {"enum": ["x"]}},
        },
        {**object_schema(a={"$ref": "#/$defs/C", "default": "x"}), "$defs": {"C": {"enum": ["x"]}}},
    ),
    "allOf of constraints": (
        object_schema(
            a={"allOf": [{"type": ["string", "null"]}, {"type": "string", "minLength": 2}, {"title": "t"}]}
        ),
        object_schema(a={"type": "string", "minLength": 2}),
    ),
    "allOf of objects": (
        {
            "allOf": [object_schema(a={"type": "int"}), {**object_schema(b={}), "required": ["b"]}],
            "required": ["a"],
        },
        {**object_schema(a={"type": "integer"}, b={}), "required": ["a", "b"]},
    ),
    "required without a schema": (
        {**object_schema(a={}), "required": ["b"]},
        {**object_schema(a={}, b={}), "required": ["b"]},
    ),
    "a percent-encoded reference": (
        {**object_schema(a={"$ref": "#/$defs/A%20B"}), "$defs": {"A B": {"type": "int"}}},
        {
            **object_schema(a={"$ref": "#/$defs/root_1"}),
            "$defs": {"A B": {"type": "integer"}, "root_1": {"type": "integer"}},
        },
    ),
    "an anchor": (
        {**object_schema(a={"$ref": "#c"}), "$defs": {"C": {"$anchor": "c", "type": "int"}}},
        {
            **object_schema(a={"$ref": "#/$defs/root_1"}),
            "$defs": {key: {"$anchor": "c", "type": "integer"} for key in ("C", "root_1")},
        },
    ),
    "an absolute reference": (
        {
            "$id": "http://x/s",
            **object_schema(a={"$ref": "http://x/s#/$defs/A"}),
            "$defs": {"A": {"type": "string"}},
        },
        {"$id": "http://x/s", **object_schema(a={"$ref": "#/$defs/A"}), "$defs": {"A": {"type": "string"}}},
    ),
}


@pytest.mark.parametrize("case", EQUAL)
def test_equivalent_forms_are_normalized(case: str) -> None:
    before, after = EQUAL[case]
    copy = json.loads(json.dumps(before))
    converted = convert_schema(before)
    assert converted.schema == after and not converted.problems
    assert before == copy


def test_a_reference_to_the_root_becomes_one_to_a_definition() -> None:
    tree = object_schema(name={"type": "string"}, children={"type": "array", "items": {"$ref": "#"}})
    converted = convert_schema(tree)
    node = object_schema(
        name={"type": "string"}, children={"type": "array", "items": {"$ref": "#/$defs/root"}}
    )
    assert converted.schema == {**node, "$defs": {"root": node}} and not converted.problems
    with_root = {**tree, "$defs": {"root": {"type": "string"}}}
    assert convert_schema(with_root).schema["$defs"].keys() == {"root", "root_"}


BROKEN = {
    "an unknown type": (object_schema(a={"type": "spam"}), "/properties/a", "type"),
    "an unresolved reference": (object_schema(a={"$ref": "#/$defs/no"}), "/properties/a", "$ref"),
    "an external reference": (object_schema(a={"$ref": "http://x/y"}), "/properties/a", "$ref"),
    "a lookaround": (object_schema(a={"type": "string", "pattern": "^(?=a)b$"}), "/properties/a", "pattern"),
    "properties that are a string": ({"type": "object", "properties": "x"}, "", "properties"),
    "an invalid bound": (
        object_schema(**{"a/b": {"type": "integer", "minimum": "x"}}),
        "/properties/a~1b",
        "minimum",
    ),
    "a number as a schema": (object_schema(a=5), "/properties/a", "schema"),
    "allOf that can't be merged": (
        object_schema(a={"allOf": [{"pattern": "^a$"}, {"pattern": "^b$"}]}),
        "/properties/a",
        "allOf",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_invalid_parts_are_reported_with_their_pointer(case: str) -> None:
    schema, pointer, keyword = BROKEN[case]
    (problem,) = convert_schema(schema).problems
    assert (problem.pointer, problem.keyword) == (pointer, keyword)


@pytest.mark.llama
@pytest.mark.parametrize("path", PATHS)
async def test_llama_cpp_accepts_tools_with_these_schemas(real: str, http: ClientSession, path: str) -> None:
    for number, schema in enumerate(
        [*(case for case, _ in EQUAL.values()), *(case[0] for case in BROKEN.values())]
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
    """The fields that request the schema from ``path``."""
    if path == "/api/chat":
        return {"format": schema}
    if path == "/v1/messages":
        return {"output_config": {"format": {"type": "json_schema", "schema": schema}}}
    named_schema = {"name": "x", "schema": schema, "strict": strict}
    if path == "/v1/responses":
        return {"text": {"format": {"type": "json_schema", **named_schema}}}
    return {"response_format": {"type": "json_schema", "json_schema": named_schema}}


@pytest.mark.llama
@pytest.mark.parametrize("path", PATHS)
async def test_llama_cpp_accepts_formats_with_these_schemas(
    real: str, http: ClientSession, path: str
) -> None:
    for schema, _ in EQUAL.values():
        body = body_of(path, "demo", USER, **formatted(path, schema, strict=True))
        status, answer, _ = await post(http, real + path, body)
        assert status == 200, (schema, answer)


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("path", PATHS)
async def test_a_strict_format_is_refused_with_the_keyword_and_pointer(
    serve: Serve, http: ClientSession, path: str, case: str
) -> None:
    service = ScriptedService(chunk("{}"), chunk(finish="stop"), usage_chunk())
    url = await serve(parts(service))
    schema, pointer, keyword = BROKEN[case]
    body = body_of(path, "demo", USER, **formatted(path, schema, strict=True), stream=True)
    async with http.post(url + path, json=body) as answer:
        if path == "/api/chat":
            # Ollama's format isn't strict, so there is an answer with a warning.
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


def test_keywords_that_llama_cpp_ignores_are_reported() -> None:
    schema = object_schema(
        a={"type": "array", "items": {"type": "number", "minimum": 1}, "uniqueItems": True}
    )
    pointers = [(problem.pointer, problem.keyword) for problem in unenforced(convert_schema(schema).schema)]
    assert pointers == [("/properties/a", "uniqueItems"), ("/properties/a/items", "minimum")]
    schema = object_schema(a={"type": "string", "pattern": "^(a|bc)+$", "minLength": 2})
    assert [problem.keyword for problem in unenforced(convert_schema(schema).schema)] == ["minLength"]


@pytest.mark.parametrize(
    ("schema", "sent", "keyword"),
    [
        ({"type": "string"}, {"type": "object"}, "type"),
        ({"type": ["object", "null"]}, {"type": "object"}, ""),
        ({"properties": {"a": {"not": {}}}}, object_schema(a={"not": {}}), "not"),
    ],
)
def test_arguments_of_a_tool_are_always_an_object(schema: Any, sent: Any, keyword: str) -> None:
    body: dict[str, Any] = {
        "messages": USER,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}],
    }
    warnings = prepare_chat(body).warnings
    assert body["tools"][0]["function"]["parameters"] == sent
    assert [f'"{keyword}"' in warning for warning in warnings] == ([True] if keyword else [])


@pytest.mark.parametrize("path", PATHS)
async def test_a_schema_that_llama_cpp_refuses_is_moved_to_the_description(
    serve: Serve, http: ClientSession, path: str
) -> None:
    class Refusing(ScriptedService):
        async def open(self, ask: Any, on_wait: Any) -> Any:
            sent = json.dumps(ask.calls["llama"].body["tools"][0]["function"]["parameters"])
            why = "Automatic parser generation failed: JSON schema error at #/properties/a: odd"
            self.refusal = Refusal(Fault.ENGINE, why, status=400) if "odd" in sent else None
            return await super().open(ask, on_wait)

    service = Refusing(chunk("a"), chunk(finish="stop"), usage_chunk())
    tool_model = model(capabilities=("completion", "tools"))
    url = await serve(parts(service, tool_model))
    function = {"name": "get", "description": "Gets.", "parameters": object_schema(a={"odd": 1})}
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
def test_unsupported_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(Unsupported):
        convertible_pattern(pattern)


_QUANTIFIER = r"(?:[*+?]|\{\d+(?:,\d*)?\})"
_CLASS = r"\[(?:[^\]\\]|\\[\[\]\\-]|\\x[0-9A-F]{2})*\]"
_ESCAPED = rf"\\[\^$.\[\](){{}}|*+?](?!{_QUANTIFIER})"
_LETTER = r"(?![\\\[\](){}|*+?^$.])[ -~]"
_READ = re.compile(
    rf"\^(?:{_CLASS}{_QUANTIFIER}?|{_ESCAPED}|{_LETTER}{_QUANTIFIER}?|\((?!\?)|\||\){_QUANTIFIER}?)*\$"
)


@given(st.text(r"ab^$.[](){}|*+?\dwsDux0e9é-", max_size=10))
@example(r"^[a\.\^]+$")
@example(r"^v1\.?$")
@example(r"^\u00e9{2}$")
def test_converted_patterns_use_only_syntax_that_llama_cpp_reads(pattern: str) -> None:
    """llama.cpp drops patterns with other escapes in a class. A quantifier after an escaped character would
    also repeat the letters before it; after a non-ASCII letter it would repeat only the last byte.
    """
    try:
        converted = convertible_pattern(pattern)
    except Unsupported:
        return
    assert _READ.fullmatch(converted), converted


@given(st.text(r"ab^$.[](){}|*+?\dwsDWSux01-,:<>=!", max_size=14), st.text('ab01 -"\\\n', max_size=4))
def test_converted_patterns_match_only_what_the_original_matches(pattern: str, text: str) -> None:
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
def test_any_value_is_converted_to_a_schema(value: Any) -> None:
    converted = convert_schema(value)
    assert isinstance(converted.schema, dict)
    again = convert_schema(converted.schema)
    assert not [problem for problem in again.problems if problem.keyword not in ("$ref", "pattern")]
    list(unenforced(converted.schema))
