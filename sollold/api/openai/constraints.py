"""Translates other servers' fields for constrained output into those of this API. Pure.

vLLM: ``guided_json``, ``guided_regex``, ``guided_choice``, ``guided_grammar`` and ``structured_outputs``.
Text Generation Inference: a ``response_format`` or a ``grammar`` with a ``value``.
"""

from __future__ import annotations

import re
from typing import Any

from sollold.api.grammar.pattern import Unsupported, convertible_pattern
from sollold.api.http.json_text import decode_text
from sollold.errors import bad_request
from sollold.undecodable import UNDECODABLE

_GUIDED = {f"guided_{kind}": kind for kind in ("json", "regex", "choice", "grammar", "json_object")}
_IGNORED = ("guided_decoding_backend", "guided_whitespace_pattern", "structural_tag")
_KINDS = {"json": "json", "json_schema": "json", "regex": "regex"}
_FIELDS = frozenset(("structured_outputs", "grammar", "response_format", *_GUIDED, *_IGNORED))
_TOKEN = re.compile(r"\[(?:[^\]\\]|\\.)*+\]?|\\.|[()|]|[*+?]|\{\d+(?:,\d*)?\}|.", re.DOTALL)
"""Parts of a regular expression. An unterminated class extends to the end of the text; otherwise matching
would scan to the end from each bracket."""
_ROOT = re.compile(r"^[^\S\n]*+root\s*+::=", re.MULTILINE)
_MAX_CHOICES = 1000
_MAX_CHARACTERS = 64 * 1024
"""Maximum length of choices or of a pattern: engines get no longer grammar."""


def with_own_constraints(body: dict[str, Any], *, chat: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return ``body`` with its constraint as ``response_format`` (in a chat), ``json_schema`` or ``grammar``,
    and the warnings.

    Raises:
        Refusal: BAD_REQUEST.
    """
    if _FIELDS.isdisjoint(body):
        return body, ()
    requested, ignored = _requested(body)
    rest = {key: value for key, value in body.items() if key not in _GUIDED and key not in _IGNORED}
    rest.pop("structured_outputs", None)
    warnings = tuple(f"{name} has no effect" for name in ignored)
    if not requested:
        return rest if len(rest) < len(body) else body, warnings
    if len(requested) > 1:
        raise bad_request(f"only one of {', '.join(sorted(requested))} can be used")
    ((kind, value),) = requested.items()
    for name in ("grammar", "response_format"):
        if isinstance(rest.get(name), dict) and "value" in rest[name]:
            del rest[name]
    if kind in ("regex", "choice", "grammar"):
        return {**rest, "grammar": _grammar(kind, value)}, warnings
    schema = {"type": "object"} if kind == "json_object" else _schema(value)
    if chat:
        json_schema = {"name": "answer", "schema": schema}
        return {**rest, "response_format": {"type": "json_schema", "json_schema": json_schema}}, warnings
    return {**rest, "json_schema": schema}, warnings


def _requested(body: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the requested constraints by kind, and the names of fields that have no effect."""
    requested = {kind: body[name] for name, kind in _GUIDED.items() if body.get(name)}
    ignored = [name for name in _IGNORED if body.get(name) is not None]
    outputs = body.get("structured_outputs")
    if isinstance(outputs, dict):
        for name, value in outputs.items():
            if name in _GUIDED.values():
                requested |= {name: value} if value else {}
            elif value:
                ignored.append(f"structured_outputs.{name[:40]}")
    for name in ("grammar", "response_format"):
        field = body.get(name)
        if isinstance(field, dict) and "value" in field and field.get("type") in _KINDS:
            requested[_KINDS[field["type"]]] = field["value"]
    return requested, ignored


def _schema(value: Any) -> Any:
    if isinstance(value, str):
        try:
            value = decode_text(value)
        except UNDECODABLE:
            raise bad_request("the schema is a string that is not JSON") from None
    if not isinstance(value, dict):
        raise bad_request("a schema must be an object, or its JSON as a string")
    return value


def _grammar(kind: str, value: Any) -> str:
    """Return a llama.cpp grammar that matches a whole answer."""
    if kind == "choice":
        if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value):
            raise bad_request("choices must be a list of strings")
        if len(value) > _MAX_CHOICES:
            raise bad_request(f"there are more than {_MAX_CHOICES} choices")
        _check_length(sum(map(len, value)), "choices")
        return "root ::= " + " | ".join(map(_literal, value))
    if not isinstance(value, str):
        raise bad_request(f"a {kind} must be a string")
    _check_length(len(value), kind)
    if kind == "grammar":
        if not _ROOT.search(value):
            raise bad_request("a grammar must be in llama.cpp's format (GBNF), with a rule root ::= …")
        return value
    try:
        return f"root ::= {_pattern_rule(convertible_pattern(f'^({_without_anchors(value)})$'))}"
    except Unsupported as error:
        raise bad_request(f"the regular expression can't be enforced: {error}") from None


def _check_length(length: int, kind: str) -> None:
    if length > _MAX_CHARACTERS:
        raise bad_request(f"{kind}: longer than {_MAX_CHARACTERS} characters")


def _without_anchors(pattern: str) -> str:
    """Return a pattern without the anchors at the ends of its alternatives: it must match the whole text."""
    alternatives: list[list[str]] = [[]]
    depth = 0
    for token in _TOKEN.findall(pattern):
        depth += (token == "(") - (token == ")")
        if token == "|" and not depth:
            alternatives.append([])
        else:
            alternatives[-1].append(token)
    for tokens in alternatives:
        if tokens[:1] == ["^"]:
            del tokens[0]
        if tokens[-1:] == ["$"]:
            del tokens[-1]
    return "|".join("".join(tokens) for tokens in alternatives)


def _pattern_rule(pattern: str) -> str:
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
