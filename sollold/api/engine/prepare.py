"""The last steps from a dialect's request to the body for llama-server. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from sollold.api.engine.continue_message import NO_PREFIX, AnswerPrefix, continue_last_message
from sollold.api.engine.conversation import merge_answers
from sollold.api.engine.protect import check_size
from sollold.api.engine.tool_arguments import as_one_object
from sollold.api.engine.tools import normalize_history, normalize_tools
from sollold.api.grammar.keywords import Schema
from sollold.api.grammar.problem import SchemaProblem
from sollold.api.grammar.schema import ConvertedSchema, convert_schema
from sollold.api.grammar.unenforced import unenforced
from sollold.api.grammar.values import Effort
from sollold.errors import Fault, Refusal
from sollold.facts import dataclass


@dataclass(frozen=True, slots=True)
class Prepared:
    """What preparing a body has found.

    Attributes:
        prefix: the beginning of the answer, when the caller sent one.
        warnings: what llama-server can't do as it was asked, a sentence each.
    """

    prefix: AnswerPrefix = NO_PREFIX
    warnings: tuple[str, ...] = ()


def normalize_chat(body: dict[str, Any]) -> dict[str, Any]:
    """``body``, its tools and tool calls put in place into the form that both engines take.

    Raises:
        Refusal: BAD_REQUEST naming what has no clear meaning.
    """
    body["messages"] = normalize_history(body["messages"])
    if body.get("tools"):
        body["tools"] = normalize_tools(body["tools"])
    else:
        body.pop("tools", None)
    return body


_EFFORTS = {"minimal": "low", "xhigh": "high", "max": "high"}
"""Efforts that templates do not know → the nearest that they do."""

_MOST_GROWTH = 1000
"""Characters by which the schema of a tool may become longer than twice what it was."""
_MOST_PLACES = 4
"""Of one schema: who knows these knows what to change, and a header has no room for all."""
_MOST_TOOLS = 8
_ENCODER = msgspec.json.Encoder()


def prepare_chat(body: dict[str, Any]) -> Prepared:
    """Adapt a normalized chat to llama-server, in place.

    Raises:
        Refusal: BAD_REQUEST for a strict format that has no grammar.
    """
    body["messages"] = merge_answers(body["messages"])
    effort = body.get("reasoning_effort")
    if isinstance(effort, str) and effort in _EFFORTS:
        body["reasoning_effort"] = _EFFORTS[effort]
    warnings = _convert_tools(body) if body.get("tools") else []
    return Prepared(continue_last_message(body), (*warnings, *prepare_format(body)))


def prepare_format(body: dict[str, Any]) -> tuple[str, ...]:
    """Rewrite the schema of the answer's format for llama-server, in place; the warnings.

    Raises:
        Refusal: BAD_REQUEST for a strict format that has no grammar, with the keyword and its place.
    """
    wanted = body.get("response_format")
    if isinstance(body.get("json_schema"), dict):
        body["json_schema"], warnings = _convert_format(body["json_schema"], strict=False)
        return warnings
    if not isinstance(wanted, dict):
        return ()
    named = wanted.get("json_schema")
    if isinstance(named, dict) and named.get("schema") is not None:
        schema, warnings = _convert_format(named["schema"], strict=named.get("strict") is True)
        body["response_format"] = {**wanted, "json_schema": {**named, "schema": schema}}
        return warnings
    if wanted.get("schema") is not None:
        schema, warnings = _convert_format(wanted["schema"], strict=wanted.get("strict") is True)
        body["response_format"] = {**wanted, "schema": schema}
        return warnings
    return ()


def _convert_format(given: Any, *, strict: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    check_size(given, "the schema")
    converted = convert_schema(given)
    if strict and converted.problems:
        raise Refusal(
            Fault.BAD_REQUEST,
            f"strict: the format's schema can't be converted to a grammar: {converted.problems[0]}",
        )
    problems = [*converted.problems, *converted.notes, *unenforced(converted.schema)]
    return converted.schema, tuple(_schema_warnings("format", problems))


def _convert_arguments(given: Any, effort: Effort) -> tuple[ConvertedSchema, Schema, list[SchemaProblem]]:
    """The schema of a tool converted, it as one object, and what is not enforced for that.

    Templates write it into the prompt, where it must not become much longer.
    """
    converted = convert_schema(given, effort, formats=False)
    schema, further = as_one_object(given, converted.schema)
    if schema != given and len(_ENCODER.encode(schema)) > 2 * len(_ENCODER.encode(given)) + _MOST_GROWTH:
        converted = convert_schema(given, Effort(visits=0), formats=False)
        schema, further = as_one_object(given, converted.schema)
    return converted, schema, further


def _convert_tools(body: dict[str, Any]) -> list[str]:
    """Convert the schemas of its tools, in place; what of them is not enforced, of many how many."""
    check_size(body["tools"], "tools")
    warnings: list[str] = []
    effort = Effort()
    body["tools"] = [_convert_tool(tool, warnings, effort) for tool in body["tools"]]
    if (further := len(warnings) - _MOST_TOOLS) > 0:
        warnings[_MOST_TOOLS:] = [f"not all is enforced of the schemas of {further} more tools"]
    return warnings


def _convert_tool(tool: dict[str, Any], warnings: list[str], effort: Effort) -> dict[str, Any]:
    """``tool`` with a schema that has a grammar; what is not enforced goes to ``warnings``."""
    function = tool["function"]
    if function.get("parameters") is None:
        return tool
    converted, schema, further = _convert_arguments(function["parameters"], effort)
    problems = [*converted.problems, *converted.notes, *unenforced(converted.schema), *further]
    kinds = schema.get("type", "object")
    if kinds != "object" and "object" not in kinds:
        problems = [SchemaProblem("", "type", "the arguments of a tool are an object")]
        schema = {"type": "object"}
    elif not any(key in schema for key in ("$ref", "anyOf", "oneOf", "allOf")):
        schema = {**schema, "type": "object"}
    name = function["name"][:60]
    warnings += _schema_warnings(f'tool "{name}"', problems)
    return {**tool, "function": {**function, "parameters": schema}}


def _schema_warnings(what: str, problems: Iterable[SchemaProblem]) -> list[str]:
    """One warning for the schema of ``what``; none where all of it is enforced."""
    found = list(dict.fromkeys(str(problem) for problem in problems))
    if not found:
        return []
    further = f" and {len(found) - _MOST_PLACES} more" if len(found) > _MOST_PLACES else ""
    return [f"{what}: not enforced: {', '.join(found[:_MOST_PLACES])}{further}"]
