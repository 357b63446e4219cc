"""``not``, ``uniqueItems`` and ``contains`` are converted to a list of exactly the valid values."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from sollold.api.engine.prepare import prepare_chat
from sollold.api.engine.protect import protected
from sollold.api.grammar.schema import convert_schema
from sollold.api.grammar.unenforced import unenforced
from sollold.serving.request import Call, Engine
from tests.api.llama_grammars import Grammar

ITEMS = ["a", "b", "c", 1, True]
VALUES: list[Any] = [
    *(list(items) for count in range(4) for items in itertools.product(ITEMS, repeat=count)),
    *range(-4, 14),
    *("", "a", "ab", "abc", "abcd", None),
]
LETTERS = {"enum": ["a", "b", "c"]}
ARRAY = {"type": "array", "items": LETTERS}
WHOLE = {"type": "integer"}
TEXT = {"type": "string"}
EXACT: list[dict[str, Any]] = [
    {**ARRAY, "uniqueItems": True},
    {**ARRAY, "uniqueItems": True, "minItems": 2},
    {**ARRAY, "uniqueItems": True, "maxItems": 1},
    {"type": ["array", "null"], "items": LETTERS, "uniqueItems": True, "minItems": 1},
    {"type": "array", "items": {"type": "boolean"}, "uniqueItems": True},
    {"type": "array", "items": {"$ref": "#/$defs/L"}, "uniqueItems": True, "$defs": {"L": LETTERS}},
    {**ARRAY, "uniqueItems": True, "contains": {"const": "b"}},
    {**ARRAY, "uniqueItems": True, "contains": {"enum": ["a", "b"]}, "minContains": 2},
    {**ARRAY, "contains": {"const": "a"}, "maxItems": 3},
    {**ARRAY, "contains": {"const": "a"}, "minItems": 2, "maxItems": 3},
    {"type": "array", "contains": {"type": "integer"}, "maxItems": 2, "items": {"enum": ["a", 1]}},
    {**ARRAY, "contains": {"const": "a"}, "minContains": 0},
    {"type": "array", "prefixItems": [TEXT, WHOLE], "items": False, "contains": WHOLE, "maxItems": 2},
    {"enum": [["a", "a"], ["a", "b"], ["b"]], "uniqueItems": True, "contains": {"const": "a"}},
    {**WHOLE, "not": {"const": 0}, "minimum": 0, "maximum": 10},
    {**WHOLE, "not": {"enum": [3, 5, "x", 5.0]}, "minimum": 1, "maximum": 7},
    {**WHOLE, "not": {"const": 4}},
    {**WHOLE, "not": {"minimum": 10}},
    {**WHOLE, "not": {"exclusiveMaximum": 3}, "maximum": 9},
    {**WHOLE, "not": {"type": "integer", "maximum": 3}, "exclusiveMaximum": 9.5},
    {**TEXT, "not": {"const": ""}},
    {**TEXT, "not": {"maxLength": 2}},
    {**TEXT, "not": {"minLength": 3}, "minLength": 1},
]


@pytest.mark.parametrize("schema", EXACT, ids=repr)
def test_exactly_the_valid_values_are_accepted(schema: dict[str, Any]) -> None:
    converted = convert_schema(schema)
    assert not [*converted.problems, *converted.notes, *unenforced(converted.schema)]
    grammar, valid = Grammar(converted.schema), Draft202012Validator(schema)
    for value in VALUES:
        assert grammar.accepts(converted.schema, value) == valid.is_valid(value), (value, converted.schema)


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({**ARRAY, "uniqueItems": True, "minItems": 4}, "uniqueItems"),
        ({**ARRAY, "items": {"enum": [*"abcdefgh"]}, "uniqueItems": True}, "uniqueItems"),
        ({**ARRAY, "items": {"enum": ["x" * 4000, "y"]}, "uniqueItems": True}, "uniqueItems"),
        ({**ARRAY, "items": TEXT, "uniqueItems": True}, "uniqueItems"),
        ({**ARRAY, "contains": {"const": "a"}}, "contains"),
        ({**ARRAY, "contains": {"const": "a"}, "maxItems": 9}, "contains"),
        ({**ARRAY, "contains": {"const": "a"}, "maxItems": 3, "minContains": 2}, "contains"),
        ({**WHOLE, "not": {"const": 3}, "minimum": 3, "maximum": 3}, "not"),
        ({**WHOLE, "not": {"enum": [*range(0, 40, 2)]}}, "not"),
        ({**WHOLE, "not": {"multipleOf": 2}}, "not"),
        ({**TEXT, "not": {"const": "a"}}, "not"),
        ({"type": ["integer", "null"], "not": {"const": 0}}, "not"),
    ],
    ids=repr,
)
def test_keywords_that_would_need_too_many_values_are_not_enforced(
    schema: dict[str, Any], keyword: str
) -> None:
    converted = convert_schema(schema)
    problems_found = [*converted.problems, *converted.notes, *unenforced(converted.schema)]
    assert keyword in [problem.keyword for problem in problems_found]


def test_tools_are_not_made_much_longer() -> None:
    tool: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": {}}}
    four = {"type": "array", "items": {"enum": [*"abcd"]}, "uniqueItems": True}
    three = {**four, "items": {"enum": [*"abc"]}}
    for items, listed in ((four, False), (three, True)):
        function = {**tool["function"], "parameters": {"type": "object", "properties": {"x": items}}}
        tools: list[dict[str, Any]] = [{**tool, "function": function}]
        body = {"messages": [{"role": "user", "content": "a"}], "tools": tools}
        warned = prepare_chat(body).warnings
        sent = body["tools"][0]["function"]["parameters"]["properties"]["x"]
        assert ("enum" in sent) is listed and bool(warned) is not listed


def test_many_unique_arrays_take_bounded_time_and_space() -> None:
    unique = {"type": "array", "items": {"enum": [*"abcde"]}, "uniqueItems": True, "maxItems": 3}
    schema = {"type": "object", "properties": {f"p{n}": unique for n in range(300)}}
    body: dict[str, Any] = {"json_schema": schema, "messages": [{"role": "user", "content": "a"}]}
    began = time.thread_time()
    warned = prepare_chat(body).warnings
    assert time.thread_time() - began < 1.5
    assert "uniqueItems" in warned[0]
    # The result is not refused for its size.
    protected({Engine.LLAMA: Call("/v1/chat/completions", body)})
