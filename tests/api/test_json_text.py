"""JSON and patterns in strings of a request: decoded within limits, without blocking the event loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from sollold.api.engine.forced_tool import _call_in
from sollold.api.engine.placement import PlacementBody
from sollold.api.engine.tools import arguments_text, normalize_tools
from sollold.api.http.body import as_type
from sollold.api.ollama.request import format_of
from sollold.api.openai.constraints import with_own_constraints
from sollold.errors import Fault, Refusal

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
    assert refused.value.fault is Fault.BAD_REQUEST and time.thread_time() - started < 0.15


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
    assert time.thread_time() - started < 0.15


def test_a_grammar_may_begin_with_blank_lines() -> None:
    grammar = '\n\n  root ::= "a"'
    assert guided("grammar")(grammar)[0]["grammar"] == grammar


def test_a_long_name_of_an_unknown_field_is_refused_quickly() -> None:
    started = time.thread_time()
    with pytest.raises(Refusal, match="unknown field aaa") as refused:
        as_type({"a" * 8_000_000: 1}, PlacementBody)
    assert time.thread_time() - started < 0.15 and len(refused.value.message) < 2000


def test_a_forced_call_with_a_long_run_of_spaces_is_read_quickly() -> None:
    text = '{"name":"f","arguments":{"x":"' + " " * 100_000 + '"}}'
    started = time.thread_time()
    call = _call_in(text)
    assert isinstance(call, dict) and time.thread_time() - started < 0.15
    assert _call_in("```\nno call \n``` ") == "no call"
    assert _call_in(" no call ") == " no call "
