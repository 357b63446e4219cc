"""Translates other servers' fields for constrained output into those of this API. Pure.

vLLM: ``guided_json``, ``guided_regex``, ``guided_choice``, ``guided_grammar`` and ``structured_outputs``.
Text Generation Inference: a ``response_format`` or a ``grammar`` with a ``value``.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from sollold.api.grammar.pattern import Unsupported, convertible_pattern
from sollold.errors import Fault, Refusal

_GUIDED = {f"guided_{kind}": kind for kind in ("json", "regex", "choice", "grammar", "json_object")}
_OTHER = ("guided_decoding_backend", "guided_whitespace_pattern", "structural_tag")
_OF_VALUES = {"json": "json", "json_schema": "json", "regex": "regex"}
_ALL = frozenset(("structured_outputs", "grammar", "response_format", *_GUIDED, *_OTHER))
_TOKEN = re.compile(r"\[(?:[^\]\\]|\\.)*+\]|\\.|[()|]|[*+?]|\{\d+(?:,\d*)?\}|.", re.DOTALL)
_MOST_CHOICES = 1000


def with_own_constraints(body: dict[str, Any], *, chat: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return ``body`` with its constraint as ``response_format`` (in a chat), ``json_schema`` or ``grammar``,
    and the warnings.

    Raises:
        Refusal: BAD_REQUEST.
    """
    if _ALL.isdisjoint(body):
        return body, ()
    asked, left_out = _asked(body)
    known = {key: value for key, value in body.items() if key not in _GUIDED and key not in _OTHER}
    known.pop("structured_outputs", None)
    warnings = tuple(f"{name} has no effect" for name in left_out)
    if not asked:
        return known if len(known) < len(body) else body, warnings
    if len(asked) > 1:
        raise Refusal(Fault.BAD_REQUEST, f"only one of {', '.join(sorted(asked))} can be used")
    ((kind, value),) = asked.items()
    for name in ("grammar", "response_format"):
        if isinstance(known.get(name), dict) and "value" in known[name]:
            del known[name]
    if kind in ("regex", "choice", "grammar"):
        return {**known, "grammar": _grammar(kind, value)}, warnings
    schema = {"type": "object"} if kind == "json_object" else _schema(value)
    if chat:
        named = {"name": "answer", "schema": schema}
        return {**known, "response_format": {"type": "json_schema", "json_schema": named}}, warnings
    return {**known, "json_schema": schema}, warnings


def _asked(body: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the requested constraints by kind, and the names of fields that have no effect."""
    asked = {kind: body[name] for name, kind in _GUIDED.items() if body.get(name)}
    left_out = [name for name in _OTHER if body.get(name) is not None]
    outputs = body.get("structured_outputs")
    if isinstance(outputs, dict):
        for name, value in outputs.items():
            if name in _GUIDED.values():
                asked |= {name: value} if value else {}
            elif value:
                left_out.append(f"structured_outputs.{name[:40]}")
    for name in ("grammar", "response_format"):
        given = body.get(name)
        if isinstance(given, dict) and "value" in given and given.get("type") in _OF_VALUES:
            asked[_OF_VALUES[given["type"]]] = given["value"]
    return asked, left_out


def _schema(value: Any) -> Any:
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except msgspec.DecodeError:
            raise Refusal(Fault.BAD_REQUEST, "the schema is a string that is not JSON") from None
    if not isinstance(value, dict):
        raise Refusal(Fault.BAD_REQUEST, "a schema must be an object, or its JSON as a string")
    return value


def _grammar(kind: str, value: Any) -> str:
    """Return a llama.cpp grammar that matches a whole answer."""
    if kind == "choice":
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise Refusal(Fault.BAD_REQUEST, "choices must be a list of strings")
        if len(value) > _MOST_CHOICES:
            raise Refusal(Fault.BAD_REQUEST, f"there are more than {_MOST_CHOICES} choices")
        return "root ::= " + " | ".join(map(_literal, value))
    if not isinstance(value, str):
        raise Refusal(Fault.BAD_REQUEST, f"a {kind} must be a string")
    if kind == "grammar":
        if not re.search(r"^\s*root\s*::=", value, re.MULTILINE):
            raise Refusal(
                Fault.BAD_REQUEST, "a grammar must be in llama.cpp's format (GBNF), with a rule root ::= …"
            )
        return value
    inner = value.removeprefix("^")
    if inner.endswith("$") and not inner.endswith("\\$"):
        inner = inner[:-1]
    try:
        return f"root ::= {_of_pattern(convertible_pattern(f'^({inner})$'))}"
    except Unsupported as error:
        raise Refusal(Fault.BAD_REQUEST, f"the regular expression can't be enforced: {error}") from None


def _of_pattern(pattern: str) -> str:
    """Return a converted pattern as the right-hand side of a grammar rule."""
    out: list[str] = []
    for token in _TOKEN.findall(pattern[1:-1]):
        if token[0] == "[" or token in "()|":
            out.append(token)
        elif token in ("*", "+", "?") or (token[0] == "{" and len(token) > 1):
            out[-1] += token
        else:
            out.append(_literal(token[1] if token[0] == "\\" else token))
    return " ".join(out)


def _literal(text: str) -> str:
    """Return a string as a quoted literal; grammars know only these escapes."""
    escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return '"' + "".join(escapes.get(char, char) for char in text) + '"'
