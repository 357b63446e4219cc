"""The last steps from a dialect's request to the body for llama-server. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from sollold.api.engine.continue_message import NO_PREFIX, AnswerPrefix, continue_last_message
from sollold.api.engine.conversation import merge_answers, results_in_order
from sollold.api.engine.protect import MeasuredTools, check_size, check_width
from sollold.api.engine.tool_arguments import as_one_object
from sollold.api.engine.tools import normalize_history, normalize_tools, unconstrained_tool
from sollold.api.grammar.keywords import Schema
from sollold.api.grammar.problem import SchemaProblem
from sollold.api.grammar.schema import ConvertedSchema, convert_schema
from sollold.api.grammar.schema_width import SchemaWidth, TooWide
from sollold.api.grammar.unenforced import unenforced
from sollold.api.grammar.values import Effort
from sollold.errors import bad_request
from sollold.facts import dataclass


@dataclass(frozen=True, slots=True)
class Prepared:
    """Results of preparing a body.

    Attributes:
        prefix: the beginning of the answer, if the caller sent one.
        warnings: parts of the request that llama-server can't fulfil, one sentence each.
    """

    prefix: AnswerPrefix = NO_PREFIX
    warnings: tuple[str, ...] = ()


def normalize_chat(body: dict[str, Any]) -> dict[str, Any]:
    """Normalize the tools, tool calls and results of ``body``, in place, to a form both engines accept.

    Raises:
        Refusal: BAD_REQUEST naming the part without a clear meaning.
    """
    body["messages"] = results_in_order(normalize_history(body["messages"]))
    if body.get("tools"):
        body["tools"] = normalize_tools(body["tools"])
    else:
        body.pop("tools", None)
    return body


_EFFORTS = {"minimal": "low", "xhigh": "high", "ultra": "high", "max": "high"}
"""Efforts unknown to chat templates → the nearest known ones."""

_MAX_GROWTH = 1000
"""Characters by which a tool's schema may exceed twice its original length."""
_MAX_PROBLEMS = 4
"""Maximum problems reported per schema: these show what to change, and a header has no room for more."""
_MAX_TOOLS = 8
_ENCODER = msgspec.json.Encoder()


def prepare_chat(body: dict[str, Any]) -> Prepared:
    """Adapt a normalized chat to llama-server, in place.

    Raises:
        Refusal: BAD_REQUEST for a strict format that has no grammar, or a tool on which an engine would hang.
    """
    body["messages"] = merge_answers(body["messages"])
    effort = body.get("reasoning_effort")
    if isinstance(effort, str) and effort in _EFFORTS:
        body["reasoning_effort"] = _EFFORTS[effort]
    warnings = _convert_tools(body) if body.get("tools") else []
    return Prepared(continue_last_message(body), (*warnings, *prepare_format(body)))


def prepare_format(body: dict[str, Any]) -> tuple[str, ...]:
    """Rewrite the schema of the response format for llama-server, in place, and return warnings.

    Raises:
        Refusal: BAD_REQUEST for a strict format that has no grammar, with the keyword and its location.
    """
    format_ = body.get("response_format")
    if isinstance(body.get("json_schema"), dict):
        body["json_schema"], warnings = _convert_format(body["json_schema"], strict=False)
        return warnings
    if not isinstance(format_, dict):
        return ()
    json_schema = format_.get("json_schema")
    if isinstance(json_schema, dict) and json_schema.get("schema") is not None:
        schema, warnings = _convert_format(json_schema["schema"], strict=json_schema.get("strict") is True)
        body["response_format"] = {**format_, "json_schema": {**json_schema, "schema": schema}}
        return warnings
    if format_.get("schema") is not None:
        schema, warnings = _convert_format(format_["schema"], strict=format_.get("strict") is True)
        body["response_format"] = {**format_, "schema": schema}
        return warnings
    return ()


def _convert_format(schema: Any, *, strict: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    check_size(schema, "the schema")
    converted = convert_schema(schema)
    if strict and converted.problems:
        raise bad_request(
            f"strict: the format's schema can't be converted to a grammar: {converted.problems[0]}"
        )
    problems = [*converted.problems, *converted.notes, *unenforced(converted.schema)]
    return converted.schema, tuple(_schema_warnings("format", problems))


def _convert_arguments(source: Any, effort: Effort) -> tuple[ConvertedSchema, Schema, list[SchemaProblem]]:
    """Convert a tool's schema. Return it, its form as one object, and what that form does not enforce.

    Templates write the schema into the prompt, so it must not become much longer.
    """
    converted = convert_schema(source, effort, formats=False)
    schema, further = as_one_object(source, converted.schema)
    if schema != source and len(_ENCODER.encode(schema)) > 2 * len(_ENCODER.encode(source)) + _MAX_GROWTH:
        converted = convert_schema(source, Effort(visits=0), formats=False)
        schema, further = as_one_object(source, converted.schema)
    return converted, schema, further


def _convert_tools(body: dict[str, Any]) -> list[str]:
    """Convert the tools' schemas, in place. Return warnings; beyond some tools only their number."""
    check_size(body["tools"], "tools")
    warnings: list[str] = []
    effort = Effort()
    width = SchemaWidth()
    body["tools"] = MeasuredTools(_convert_tool(tool, warnings, effort, width) for tool in body["tools"])
    if (further := len(warnings) - _MAX_TOOLS) > 0:
        warnings[_MAX_TOOLS:] = [f"the schemas of {further} more tools are not fully enforced"]
    return warnings


def _convert_tool(
    tool: dict[str, Any], warnings: list[str], effort: Effort, width: SchemaWidth
) -> dict[str, Any]:
    """Return ``tool`` with a schema that has a grammar; add what is not enforced to ``warnings``.

    If the schemas are too wide together, the last ones are not enforced: agents offer the tools of many
    servers in each request, and could never continue if it were refused.
    """
    function = tool["function"]
    if function.get("parameters") is None:
        return tool
    converted, schema, further = _convert_arguments(function["parameters"], effort)
    problems = [*converted.problems, *converted.notes, *unenforced(converted.schema), *further]
    kinds = schema.get("type", "object")
    if kinds != "object" and "object" not in kinds:
        problems = [SchemaProblem("", "type", "the arguments of a tool must be an object")]
        schema = {"type": "object"}
    elif not any(key in schema for key in ("$ref", "anyOf", "oneOf", "allOf")):
        schema = {**schema, "type": "object"}
    subject = f'tool "{function["name"][:60]}"'
    out = {**tool, "function": {**function, "parameters": schema}}
    if _exceeds(width, out):
        warnings.append(f"{subject}: not enforced: the schemas of all tools are too large for an engine")
        return unconstrained_tool(tool)
    warnings += _schema_warnings(subject, problems)
    return out


def _exceeds(width: SchemaWidth, tool: dict[str, Any]) -> bool:
    """Add ``tool`` to ``width``. Return whether it is too much because of the tools before it.

    Raises:
        Refusal: BAD_REQUEST if it is too wide by itself.
    """
    try:
        width.add(tool)
    except TooWide:
        check_width(tool, "tools")
        return True
    return False


def _schema_warnings(subject: str, problems: Iterable[SchemaProblem]) -> list[str]:
    """Return one warning about the schema of ``subject``; none if all of it is enforced."""
    reasons = list(dict.fromkeys(str(problem) for problem in problems))
    if not reasons:
        return []
    further = f" and {len(reasons) - _MAX_PROBLEMS} more" if len(reasons) > _MAX_PROBLEMS else ""
    return [f"{subject}: not enforced: {', '.join(reasons[:_MAX_PROBLEMS])}{further}"]
