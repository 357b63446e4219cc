"""Keywords that llama.cpp ignores in a schema are rewritten to a form that it reads, or reported."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import ClientSession, ClientTimeout
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from sollold.api.engine.prepare import prepare_chat
from sollold.api.grammar.formats import FORMATS
from sollold.api.grammar.pattern import convertible_pattern
from sollold.api.grammar.pattern_length import lengths, with_length
from sollold.api.grammar.problem import SchemaProblem
from sollold.api.grammar.schema import ConvertedSchema, convert_schema
from sollold.api.grammar.unenforced import unenforced
from tests.api.llama_grammars import Grammar, Stuck
from tests.api.schema_strategies import Schemas

Schema = dict[str, Any]


def object_schema(**properties: Any) -> Schema:
    return {"type": "object", "properties": properties}


def unenforced_keywords(converted: ConvertedSchema) -> list[SchemaProblem]:
    return [*converted.problems, *converted.notes, *unenforced(converted.schema)]


def validator(schema: Schema) -> Draft202012Validator:
    return Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)


STRING, INTEGER = {"type": "string"}, {"type": "integer"}
A, B = {"enum": ["a"]}, {"enum": ["b"]}
KIND = {**object_schema(kind={"enum": ["a", "b"]}, x=STRING), "required": ["kind"]}

REWRITTEN = {
    "keywords beside anyOf": (
        {**object_schema(a=STRING, b=INTEGER), "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
        {"anyOf": [{**object_schema(a=STRING, b=INTEGER), "required": [name]} for name in ("a", "b")]},
    ),
    "keywords beside $ref": (
        {"$ref": "#/$defs/S", "maxLength": 3, "$defs": {"S": {"type": "string", "minLength": 1}}},
        {
            "type": "string",
            "minLength": 1,
            "maxLength": 3,
            "$defs": {"S": {"type": "string", "minLength": 1}},
        },
    ),
    "oneOf with two required names": (
        {**object_schema(a=STRING, b=INTEGER), "oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
        {
            "anyOf": [
                {**object_schema(a=STRING), "required": ["a"], "additionalProperties": False},
                {**object_schema(b=INTEGER), "required": ["b"], "additionalProperties": False},
            ]
        },
    ),
    "a redundant type": (
        {
            "type": ["object", "null"],
            "anyOf": [{"$ref": "#/$defs/A"}, {"type": "null"}],
            "$defs": {"A": object_schema()},
        },
        {"anyOf": [{"$ref": "#/$defs/A"}, {"type": "null"}], "$defs": {"A": object_schema()}},
    ),
    "unsatisfiable alternatives": (
        {"type": "string", "anyOf": [{"type": "integer"}, {"minLength": 2}]},
        {"type": "string", "minLength": 2},
    ),
    "enum values of another type": (
        {"type": "string", "enum": ["a", 1, None]},
        {"type": "string", "enum": ["a"]},
    ),
    "enum values out of bounds": (
        {"enum": [1, 5, 9, "abc"], "minimum": 2, "maximum": 5, "maxLength": 2},
        {"enum": [5]},
    ),
    "const beside enum": ({"const": "a", "enum": ["a", "b"]}, {"const": "a"}),
    "enum values excluded by not": ({"enum": ["a", "b"], "not": {"const": "a"}}, {"enum": ["b"]}),
    "both lower bounds": (
        {"type": "integer", "minimum": 1, "exclusiveMinimum": 4, "maximum": 9},
        {"type": "integer", "minimum": 5, "maximum": 9},
    ),
    "a large bound": (
        {"type": "integer", "minimum": 10**16},
        {"type": "integer", "minimum": 10**16, "maximum": 10**18},
    ),
    "whole numbers": (
        {"type": ["number", "null"], "multipleOf": 1, "minimum": 0},
        {"type": ["integer", "null"], "minimum": 0},
    ),
    "a property excluded by a branch": (
        {
            **KIND,
            "if": {"properties": {"kind": {"const": "a"}}},
            "then": {"properties": {"x": False}},
        },
        {
            "anyOf": [
                {**object_schema(kind=A), "required": ["kind"], "additionalProperties": False},
                {**object_schema(kind=B, x=STRING), "required": ["kind"]},
            ]
        },
    ),
    "few multiples": (
        {"type": "number", "multipleOf": 0.5, "exclusiveMinimum": 0, "maximum": 1.5},
        {"enum": [0.5, 1, 1.5]},
    ),
    "few multiples or another type": (
        {"type": ["integer", "null"], "multipleOf": 5, "minimum": 1, "maximum": 11},
        {"anyOf": [{"type": "null"}, {"enum": [5, 10]}]},
    ),
    "a format": (
        {"type": "string", "format": "ipv4"},
        {"type": "string", "format": "ipv4", "pattern": FORMATS["ipv4"]},
    ),
    "a length beside a pattern": (
        {"type": "string", "pattern": "^[a-z][a-z0-9]*$", "minLength": 3, "maxLength": 8},
        {"type": "string", "pattern": "^[a-z][a-z0-9]{2,7}$", "minLength": 3, "maxLength": 8},
    ),
    "fewer prefixItems": (
        {"type": "array", "prefixItems": [STRING, INTEGER], "maxItems": 1},
        {"type": "array", "prefixItems": [STRING], "maxItems": 1},
    ),
    "more required items than prefixItems": (
        {"type": "array", "prefixItems": [STRING], "minItems": 2, "items": False, "maxItems": 1},
        None,
    ),
    "items after prefixItems": (
        {"type": "array", "prefixItems": [STRING], "items": INTEGER, "minItems": 1, "maxItems": 2},
        {
            "anyOf": [
                {"type": "array", "minItems": 1, "maxItems": 2, "prefixItems": [STRING]},
                {"type": "array", "minItems": 1, "maxItems": 2, "prefixItems": [STRING, INTEGER]},
            ]
        },
    ),
    "prefixItems of draft 7": (
        {"type": "array", "items": [STRING], "additionalItems": INTEGER, "minItems": 2, "maxItems": 2},
        {"type": "array", "minItems": 2, "maxItems": 2, "prefixItems": [STRING, INTEGER]},
    ),
    "minItems without a type": ({"minItems": 2}, {"type": "array", "minItems": 2}),
    "required without properties": (
        {"type": "object", "required": ["a"], "additionalProperties": INTEGER},
        {**object_schema(a=INTEGER), "required": ["a"], "additionalProperties": INTEGER},
    ),
    "patternProperties that match any name": (
        {"type": "object", "patternProperties": {"^.*$": INTEGER}},
        {"type": "object", "additionalProperties": INTEGER},
    ),
    "propertyNames with enum": (
        {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": INTEGER},
        {**object_schema(a=INTEGER, b=INTEGER), "additionalProperties": False},
    ),
    "at least one": (
        {**object_schema(a=STRING, b=STRING), "minProperties": 1},
        {"anyOf": [{**object_schema(a=STRING, b=STRING), "required": [name]} for name in ("a", "b")]},
    ),
    "dependentRequired": (
        {**object_schema(a=STRING, b=STRING), "dependentRequired": {"a": ["b"]}},
        {
            "anyOf": [
                {**object_schema(b=STRING), "additionalProperties": False},
                {**object_schema(a=STRING, b=STRING), "required": ["a", "b"]},
            ]
        },
    ),
    "dependencies of draft 7": (
        {
            **object_schema(a=STRING, b={}),
            "required": ["a"],
            "dependencies": {"a": {"properties": {"b": INTEGER}}},
        },
        {**object_schema(a=STRING, b=INTEGER), "required": ["a"]},
    ),
    "dependentRequired adds a name": (
        {**object_schema(a=STRING), "maxProperties": 1, "dependentRequired": {"a": ["b"]}},
        {"anyOf": [{**object_schema(b={}), "additionalProperties": False}]},
    ),
    "unevaluatedProperties": (
        {"allOf": [object_schema(a=STRING), object_schema(b=STRING)], "unevaluatedProperties": False},
        {**object_schema(a=STRING, b=STRING), "additionalProperties": False},
    ),
    "nested unevaluatedProperties": (
        {
            **object_schema(a=STRING, b=STRING),
            "anyOf": [{"unevaluatedProperties": False}, {"required": ["b"]}],
        },
        {
            "anyOf": [
                {**object_schema(), "additionalProperties": False},
                {**object_schema(a=STRING, b=STRING), "required": ["b"]},
            ]
        },
    ),
    "a condition": (
        {**KIND, "if": {"properties": {"kind": {"const": "a"}}}, "then": {"required": ["x"]}},
        {
            "anyOf": [
                {**object_schema(kind=A, x=STRING), "required": ["kind", "x"]},
                {**object_schema(kind=B, x=STRING), "required": ["kind"]},
            ]
        },
    ),
    "allOf of references": (
        {
            "allOf": [{"$ref": "#/$defs/A"}, {**object_schema(b=INTEGER), "required": ["b"]}],
            "$defs": {"A": {**object_schema(a=STRING), "description": "An A."}},
        },
        {
            **object_schema(a=STRING, b=INTEGER),
            "description": "An A.",
            "required": ["b"],
            "$defs": {"A": {**object_schema(a=STRING), "description": "An A."}},
        },
    ),
    "a reference to a rewritten schema": (
        {
            **object_schema(a={"maxLength": 2, "type": "string"}, b={"$ref": "#/properties/a"}),
            "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
        },
        {
            "anyOf": [
                {
                    **object_schema(a={"maxLength": 2, "type": "string"}, b={"$ref": "#/$defs/root_1"}),
                    "required": [name],
                }
                for name in ("a", "b")
            ],
            "$defs": {"root_1": {"maxLength": 2, "type": "string"}},
        },
    ),
    "a dynamic reference": (
        {"$dynamicRef": "#n", "$defs": {"N": {"$dynamicAnchor": "n", "type": "integer"}}},
        {
            "$ref": "#/$defs/root_1",
            "$defs": {name: {"$dynamicAnchor": "n", **INTEGER} for name in ("N", "root_1")},
        },
    ),
}


@pytest.mark.parametrize("case", REWRITTEN)
def test_ignored_keywords_are_rewritten(case: str) -> None:
    before, after = REWRITTEN[case]
    copy = json.loads(json.dumps(before))
    converted = convert_schema(before)
    assert before == copy
    if after is None:
        assert converted.problems
        return
    assert converted.schema == after and not unenforced_keywords(converted)
    again = convert_schema(converted.schema)
    assert again.schema == converted.schema or case in ("a format", "a length beside a pattern")


READ = [
    {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": INTEGER},
    {
        **object_schema(a=STRING, b={"type": ["string", "null"]}),
        "required": ["a"],
        "additionalProperties": False,
    },
    {
        "anyOf": [{"$ref": "#/$defs/A"}, {"type": "null"}],
        "default": None,
        "$defs": {"A": object_schema(a=STRING)},
    },
    {"oneOf": [{"const": "a", "title": "A"}, {"const": "b", "title": "B"}], "title": "Letters"},
    object_schema(a={"$ref": "#/$defs/A", "description": "An A."}, b={"$ref": "#/properties/a"})
    | {"$defs": {"A": {"type": "object", "additionalProperties": {"$ref": "#/$defs/A"}}}},
    {"type": "array", "items": {"enum": ["a", 1, None]}, "minItems": 1, "maxItems": 3},
    {"type": "array", "prefixItems": [STRING, INTEGER], "minItems": 2, "maxItems": 2},
    {"type": "array", "items": [STRING, INTEGER]},
    {"type": "integer", "minimum": -3, "exclusiveMaximum": 4.5},
    {"type": ["integer", "string"], "minimum": 3, "maxLength": 4},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "uuid", "minLength": 36},
    {"type": "number", "format": "double"},
    {"type": "object", "additionalProperties": {"type": "array", "items": {}}},
    object_schema(minLength=INTEGER, enum=STRING, required={"type": "boolean"}),
]


@pytest.mark.parametrize("schema", READ, ids=repr)
def test_supported_schemas_are_unchanged(schema: Schema) -> None:
    converted = convert_schema(schema)
    assert converted.schema == schema and not unenforced_keywords(converted)


OVERLOOKED = [
    ({"type": "number", "minimum": 1}, "minimum"),
    ({"type": ["number", "null"], "maximum": 1}, "maximum"),
    ({"minimum": 1}, "minimum"),
    ({"type": "number", "multipleOf": 0.1}, "multipleOf"),
    ({"type": "integer", "multipleOf": 7}, "multipleOf"),
    ({"type": "string", "format": "idn-email"}, "format"),
    ({"type": "string", "format": "date", "maxLength": 5}, "maxLength"),
    ({"type": "string", "maxLength": 5000}, "maxLength"),
    ({"type": "string", "pattern": "^(a|bc)+$", "minLength": 3}, "minLength"),
    ({"type": "string", "not": {"pattern": "^a"}}, "not"),
    ({"enum": ['a"', "b"], "pattern": "^a"}, "pattern"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"type": "array", "contains": STRING}, "contains"),
    ({"type": "array", "prefixItems": [STRING], "items": INTEGER}, "items"),
    ({"type": "object", "minProperties": 1}, "minProperties"),
    ({"type": "object", "propertyNames": {"pattern": "^a"}}, "propertyNames"),
    ({"type": "object", "patternProperties": {"^a": STRING}}, "patternProperties"),
    (
        {"type": "object", "patternProperties": {"^a": STRING}, "additionalProperties": False},
        "patternProperties",
    ),
    ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    ({"type": "object", "dependencies": {"a": ["b"]}}, "dependencies"),
    ({"type": "object", "dependentSchemas": {"a": object_schema(b=STRING)}}, "dependentSchemas"),
    (
        {**object_schema(a=STRING), "if": {"properties": {"a": {"const": "b"}}}, "then": {"required": ["a"]}},
        "if",
    ),
    ({"oneOf": [INTEGER, {"type": "number"}]}, "oneOf"),
    ({"oneOf": [{**object_schema(a=STRING), "required": ["a"]}, object_schema(b=STRING)]}, "oneOf"),
]


@pytest.mark.parametrize(("schema", "keyword"), OVERLOOKED, ids=repr)
def test_keywords_that_can_not_be_enforced_are_reported(schema: Schema, keyword: str) -> None:
    for place, outer in (
        ("", schema),
        ("/properties/a", object_schema(a=schema)),
        ("/items", {"type": "array", "items": schema}),
    ):
        problems = unenforced_keywords(convert_schema(outer))
        assert {(problem.pointer, problem.keyword) for problem in problems} == {(place, keyword)}


def test_keywords_that_can_not_be_merged_are_reported() -> None:
    schema = {"anyOf": [{"pattern": "^a$"}, {"pattern": "^b$"}], "maxLength": 9, "pattern": "^c$"}
    converted = convert_schema(object_schema(a=schema))
    assert [(problem.pointer, problem.keyword) for problem in converted.problems] == [
        ("/properties/a", "anyOf")
    ]
    assert [problem.keyword for problem in unenforced(converted.schema)] == ["maxLength", "pattern"]


IMPOSSIBLE = [
    ({"type": "string", "minLength": 5, "maxLength": 3}, "minLength"),
    ({"type": "array", "minItems": 5, "maxItems": 3}, "minItems"),
    ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
    ({"type": "string", "enum": [1, 2]}, "enum"),
    ({"type": "string", "anyOf": [{"type": "integer"}, {"type": "null"}]}, "type"),
    ({**object_schema(a=STRING), "additionalProperties": False, "required": ["b"]}, "required"),
    ({"allOf": [{"const": 1}, {"const": True}]}, "const"),
]


@pytest.mark.parametrize(("schema", "keyword"), IMPOSSIBLE, ids=repr)
def test_unsatisfiable_schemas_are_reported_and_not_enforced(schema: Schema, keyword: str) -> None:
    converted = convert_schema(object_schema(a=schema))
    assert [(problem.pointer, problem.keyword) for problem in converted.problems] == [
        ("/properties/a", keyword)
    ] or ("anyOf" in schema and converted.problems[0].pointer == "/properties/a")
    Grammar(converted.schema).write()


@settings(derandomize=True)
@given(st.integers(0, 2**32))
def test_without_a_report_only_valid_values_are_accepted(seed: int) -> None:
    chance = random.Random(seed)
    schema = Schemas(chance).document()
    converted = convert_schema(schema)
    grammar, valid = Grammar(converted.schema, chance), validator(schema)
    if unenforced_keywords(converted):
        return
    for _ in range(8):
        try:
            value = grammar.write()
            assert valid.is_valid(value), (schema, converted.schema, value)
        except (Stuck, RecursionError):
            return


@settings(derandomize=True)
@given(st.integers(0, 2**32))
def test_valid_values_are_still_accepted(seed: int) -> None:
    chance = random.Random(seed)
    schema = Schemas(chance, typed=True).document()
    converted = convert_schema(schema)
    if converted.problems or converted.notes or '"prefixItems"' in json.dumps(schema):
        # llama.cpp always writes all of prefixItems, though fewer are valid.
        return
    before, after, valid = Grammar(schema, chance), Grammar(converted.schema), validator(schema)
    for _ in range(8):
        try:
            value = before.write()
            if valid.is_valid(value):
                assert after.accepts(converted.schema, value), (schema, converted.schema, value)
        except (Stuck, RecursionError, LookupError, ValueError, TypeError):
            return


@pytest.mark.parametrize("name", FORMATS)
def test_generated_texts_of_a_format_are_valid(name: str) -> None:
    schema = {"type": "string", "format": name}
    converted = convert_schema(schema)
    assert not unenforced_keywords(converted)
    chance, valid = random.Random(name), validator(schema)
    for _ in range(300):
        text = Grammar(converted.schema, chance).write()
        # jsonschema's checker mistakes the zeros in 100 for leading zeros.
        assert name == "relative-json-pointer" or valid.is_valid(text), text
        assert CHECKS[name](text), text


def _is_host(text: str) -> bool:
    labels = text.split(".")
    return len(text) <= 253 and all(re.fullmatch("(?!-)[A-Za-z0-9-]{1,63}(?<!-)", label) for label in labels)


CHECKS: dict[str, Callable[[str], bool]] = {
    "email": lambda text: len(text) <= 254 and _is_host(text.split("@")[1]),
    "hostname": _is_host,
    "ipv4": lambda text: all(int(part) < 256 for part in text.split(".")),
    "ipv6": lambda text: text.count("::") <= 1,
    "uri": lambda text: ":" in text and " " not in text,
    "uri-reference": lambda text: " " not in text,
    "duration": lambda text: text[0] == "P" and text[-1].isalpha(),
    "json-pointer": lambda text: text == "" or text[0] == "/",
    "relative-json-pointer": lambda text: text[0].isdigit(),
}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("email", "a.b+c@mail.example.org"),
        ("hostname", "my-host.example.org"),
        ("ipv4", "192.168.0.255"),
        ("ipv6", "2001:db8::1"),
        ("ipv6", "::1"),
        ("ipv6", "1:2:3:4:5:6:7:8"),
        ("uri", "https://example.org:8080/a/b?c=d#e"),
        ("uri", "mailto:a@b.c"),
        ("uri", "urn:isbn:123"),
        ("uri-reference", "../a/b?c"),
        ("duration", "P1Y2M3DT4H5M6S"),
        ("duration", "PT36H"),
        ("json-pointer", "/a/0/~1b"),
        ("relative-json-pointer", "1/a"),
    ],
)
def test_common_texts_of_a_format_are_accepted(name: str, text: str) -> None:
    assert re.fullmatch(FORMATS[name][1:-1], text)


@given(st.text("ab|()*+?{}12,[]", max_size=10), st.integers(0, 4), st.integers(0, 6), st.integers(0, 99))
def test_with_length_adds_only_the_bounds(text: str, low: int, more: int, seed: int) -> None:
    try:
        pattern = convertible_pattern(f"^{text}$")
        compiled = re.compile(pattern[1:-1])
    except (ValueError, re.error):
        return
    fewest, most = lengths(pattern)
    bounded = with_length(pattern, low, low + more)
    chance = random.Random(seed)
    for _ in range(20):
        candidate = "".join(chance.choices("ab", k=chance.randint(0, 10)))
        if compiled.fullmatch(candidate):
            assert fewest <= len(candidate) <= most
        if bounded is not None:
            fits = compiled.fullmatch(candidate) is not None and low <= len(candidate) <= low + more
            assert (re.fullmatch(bounded[1:-1], candidate) is not None) == fits


def test_arguments_of_a_tool_stay_a_single_object() -> None:
    given_schema = {**object_schema(a=STRING, b=INTEGER), "anyOf": [{"required": ["a"]}, {"required": ["b"]}]}
    referred = {"$ref": "#/$defs/A", "$defs": {"A": object_schema(a=STRING)}}
    functions = [{"name": "f", "parameters": schema} for schema in (given_schema, referred)]
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": "a"}],
        "tools": [{"type": "function", "function": function} for function in functions],
    }
    (warning,) = prepare_chat(body).warnings
    assert 'tool "f"' in warning and '"anyOf" at /' in warning
    first, second = (tool["function"]["parameters"] for tool in body["tools"])
    assert first == object_schema(a=STRING, b=INTEGER) and second == {
        **object_schema(a=STRING),
        "$defs": {"A": object_schema(a=STRING)},
    }


@pytest.mark.llama
async def test_a_model_writes_only_valid_values(engines: dict[str, str], http: ClientSession) -> None:
    """With random weights and a high temperature, a model writes anything that its grammar accepts."""
    given_schemas = [before for case, (before, after) in REWRITTEN.items() if after and "draft 7" not in case]
    given_schemas += [Schemas(random.Random(seed)).document() for seed in range(400)]
    whole = 0
    for schema in given_schemas:
        converted = convert_schema(schema)
        if unenforced_keywords(converted):
            continue
        body = {"prompt": "a", "n_predict": 120, "temperature": 3.0, "top_k": 0, "top_p": 1, "min_p": 0}
        body |= {"seed": 1, "json_schema": converted.schema}
        async with http.post(
            engines["random:latest"] + "/completion", json=body, timeout=ClientTimeout(120)
        ) as response:
            answer = await response.json()
        if response.status != 200:
            # Some only refer to themselves.
            assert "$ref" in schema and "failed to parse grammar" in str(answer), (converted.schema, answer)
            continue
        # llama.cpp counts invalid UTF-8 bytes as characters.
        if answer["stop_type"] == "eos" and "\ufffd" not in answer["content"]:
            value = json.loads(answer["content"])
            assert validator(schema).is_valid(value), (schema, converted.schema, value)
            whole += 1
    assert whole > 50


def test_pattern_properties_become_additional_properties() -> None:
    for patterns, rest in (
        ({"^[a-z]+$": INTEGER}, INTEGER),
        ({"^a": INTEGER, "^b": STRING, "^c": INTEGER}, {"anyOf": [INTEGER, STRING]}),
    ):
        schema = {"type": "object", "patternProperties": patterns, "additionalProperties": False}
        assert convert_schema(schema).schema == {**schema, "additionalProperties": rest}


def test_a_keyword_without_effect_implies_no_type() -> None:
    schema = object_schema(a={"patternProperties": {".*": {"additionalProperties": True}}, "type": "object"})
    assert convert_schema(schema).schema == object_schema(
        a={"type": "object", "additionalProperties": {"additionalProperties": True}}
    )
