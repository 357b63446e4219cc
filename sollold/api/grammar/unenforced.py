"""Finds the keywords of a JSON schema that llama.cpp ignores when it makes a grammar. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from sollold.api.grammar.formats import FORMATS, NATIVE, OTHER_FORMATS, implies_format
from sollold.api.grammar.join import tuple_of
from sollold.api.grammar.keywords import (
    BOUNDS,
    CHOICES,
    DEFINITIONS,
    Schema,
    constrains,
    constraints_of,
    kinds_of,
)
from sollold.api.grammar.pattern_length import MOST_REPEATS, lengths
from sollold.api.grammar.plain import plain_parts
from sollold.api.grammar.problem import SchemaProblem, escaped

_IGNORED = (
    *("not", "if", "disallow", "extends"),
    *("contains", "uniqueItems", "unevaluatedItems"),
    *("patternProperties", "propertyNames", "minProperties", "maxProperties", "unevaluatedProperties"),
    *("dependencies", "dependentRequired", "dependentSchemas"),
    *("multipleOf", "divisibleBy"),
)

_MAX_QUESTIONS = 64


class _Questions:
    """Budget of questions about the meaning of a pattern, each of which takes a millisecond."""

    def __init__(self) -> None:
        self._remaining = _MAX_QUESTIONS

    def ask(self) -> bool:
        """Return whether one more question is allowed."""
        self._remaining -= 1
        return self._remaining >= 0


_Problem = tuple[str, str]
"""A keyword, and in which case it is not enforced; empty if it never is."""


def unenforced(document: Schema) -> Iterator[SchemaProblem]:
    """Yield the keywords of a converted schema that llama.cpp does not enforce."""
    return _unenforced(document, "", plain_parts(document), _Questions())


def _unenforced(
    schema: Schema, pointer: str, plain: set[int], questions: _Questions
) -> Iterator[SchemaProblem]:
    if id(schema) in plain:
        return
    for keyword in DEFINITIONS:
        for name, child in schema.get(keyword, {}).items():
            yield from _unenforced(child, f"{pointer}/{keyword}/{escaped(name)}", plain, questions)
    constraints = constraints_of(schema)
    for join in ("$ref", "oneOf", "anyOf"):
        if join in schema:
            others = [*constraints, *(key for key in ("allOf", *CHOICES) if key in schema and key != join)]
            for keyword in others:
                yield SchemaProblem(pointer, keyword, f'beside "{join}"')
            for index, child in enumerate(schema[join] if join != "$ref" else ()):
                yield from _unenforced(child, f"{pointer}/{join}/{index}", plain, questions)
            return
    listed = next((key for key in ("const", "enum") if key in schema), None)
    if listed is not None:
        for keyword in constraints:
            if keyword not in (listed, "type"):
                yield SchemaProblem(pointer, keyword, f'beside "{listed}"')
        return
    kinds = kinds_of(schema)
    for keyword, reason in _keyword_problems(schema, kinds, questions):
        yield SchemaProblem(pointer, keyword, reason)
    yield from _part_problems(schema, pointer, plain, questions)


def _keyword_problems(schema: Schema, kinds: list[str] | None, questions: _Questions) -> Iterator[_Problem]:
    for keyword in _IGNORED:
        if (
            keyword in schema
            and constrains(keyword, kinds)
            and not _forbids_nothing(keyword, schema[keyword])
        ):
            yield keyword, ""
    if kinds is None or "number" in kinds:
        for keyword in BOUNDS:
            if keyword in schema:
                reason = "without a type" if kinds is None else "for numbers with a fraction"
                yield keyword, reason
    if kinds is None or "string" in kinds:
        yield from _text_problems(schema, questions)
    if kinds is None or "array" in kinds:
        yield from _array_problems(schema, kinds)
    if kinds is None or "object" in kinds:
        yield from _object_problems(schema)
    if "allOf" in schema and (constraints_of(schema).keys() - {"type"} or kinds not in (None, ["object"])):
        yield "allOf", "beside other keywords"


def _forbids_nothing(keyword: str, value: Any) -> bool:
    """Whether a keyword has no effect; all property names are strings."""
    return value is False or (keyword == "propertyNames" and value in ({}, {"type": "string"}))


def _text_problems(schema: Schema, questions: _Questions) -> Iterator[_Problem]:
    low, high = schema.get("minLength", 0), schema.get("maxLength", math.inf)
    form = schema.get("format")
    form = form if isinstance(form, str) else ""
    pattern = schema.get("pattern")
    if pattern is not None:
        shortest, longest = lengths(pattern)
        # The pattern may be the format's own, restricted to the lengths beside it.
        needs_check = form in (*NATIVE, *OTHER_FORMATS) or (form in FORMATS and pattern != FORMATS[form])
        if needs_check and not (questions.ask() and implies_format(pattern, form)):
            yield "format", "beside a pattern"
    elif form in NATIVE:
        shortest, longest = NATIVE[form]
    else:
        if form in OTHER_FORMATS or form in FORMATS:
            yield "format", ""
        if MOST_REPEATS < high < math.inf:
            yield "maxLength", f"above {MOST_REPEATS}"
        return
    neighbor = "a pattern" if pattern is not None else "such a format"
    if low > shortest:
        yield "minLength", f"beside {neighbor}"
    if high < longest:
        yield "maxLength", f"beside {neighbor}"


def _array_problems(schema: Schema, kinds: list[str] | None) -> Iterator[_Problem]:
    prefix, rest = tuple_of(schema)
    if prefix:
        if isinstance(schema.get("items"), dict | bool):
            yield "prefixItems", 'beside "items"'
        elif isinstance(rest, dict):
            return
        if not schema.get("minItems", 0) <= len(prefix) <= schema.get("maxItems", math.inf):
            yield "minItems" if "minItems" in schema else "maxItems", "beside a tuple of items"
        return
    if schema.get("maxItems", 0) > MOST_REPEATS:
        yield "maxItems", f"above {MOST_REPEATS}"
    if kinds is None and "items" not in schema:
        for keyword in ("minItems", "maxItems"):
            if keyword in schema:
                yield keyword, "without a type"


def _object_problems(schema: Schema) -> Iterator[_Problem]:
    properties = schema.get("properties", {})
    missing = [name for name in schema.get("required", ()) if name not in properties]
    if missing:
        yield "required", f"{missing[0][:40]!r} has no schema"


def _part_problems(
    schema: Schema, pointer: str, plain: set[int], questions: _Questions
) -> Iterator[SchemaProblem]:
    for name, child in schema.get("properties", {}).items():
        yield from _unenforced(child, f"{pointer}/properties/{escaped(name)}", plain, questions)
    for keyword in ("allOf", "prefixItems", "items"):
        children: Any = schema.get(keyword)
        for index, child in enumerate(children if isinstance(children, list) else ()):
            yield from _unenforced(child, f"{pointer}/{keyword}/{index}", plain, questions)
    for keyword in ("items", "additionalProperties"):
        child = schema.get(keyword)
        if isinstance(child, dict):
            yield from _unenforced(child, f"{pointer}/{keyword}", plain, questions)
