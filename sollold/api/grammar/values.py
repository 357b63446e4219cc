"""Checks whether the values listed in a JSON schema satisfy the keywords beside them. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from sollold.api.grammar.formats import has_format
from sollold.api.grammar.join import Unsatisfiable, tuple_of
from sollold.api.grammar.keywords import (
    CHOICES,
    CONDITIONS,
    Schema,
    constraints_of,
    exact,
    is_among,
    kind_of_value,
    kinds_of,
    same,
)
from sollold.api.grammar.pattern_match import matches
from sollold.facts import dataclass

Resolve = Callable[[str], Schema | None]
"""Returns the schema at a reference; None if there is none."""

_MAX_DEPTH = 30
_MAX_REFERENCES = 8
_PLAIN = re.compile(r'(?:(?!["\\\x00-\x1f])(?:\S| ))*+')


@dataclass(slots=True)
class Effort:
    """Remaining budget for converting the schemas of a request: some 50 ms of work.

    Attributes:
        visits: schemas that result from joining.
        values: values to check.
        letters: characters of patterns.
    """

    visits: int = 800
    values: int = 10_000
    letters: int = 32 * 1024


class ValueCheck:
    """Checks values as long as there is effort left; after that, all results are unknown."""

    def __init__(self, resolve: Resolve, effort: Effort) -> None:
        self.resolve = resolve
        self._effort = effort

    def spend(self, values: int) -> bool:
        """Return whether ``values`` more may be listed, and deduct them if so."""
        if values > self._effort.values:
            return False
        self._effort.values -= values
        return True

    def admits(self, schema: Any, value: Any, depth: int = 0) -> bool | None:
        """Return whether ``value`` satisfies a converted schema; None if unknown, as for some patterns."""
        if isinstance(schema, bool):
            return schema
        self._effort.values -= 1
        if self._effort.values < 0 or depth > _MAX_DEPTH:
            return None
        kind = kind_of_value(value)
        kinds = kinds_of(schema)
        if kinds is not None and kind not in kinds and not (kind == "integer" and "number" in kinds):
            return False
        if "const" in schema and not same(schema["const"], value):
            return False
        if "enum" in schema and not is_among(value, schema["enum"]):
            return False
        results = [self._check_kind(kind, schema, value, depth)]
        if results[0] is not False:
            results += self._joins(schema, value, depth)
        return _all(results)

    def _check_kind(self, kind: str, schema: Schema, value: Any, depth: int) -> bool | None:
        if kind in ("integer", "number"):
            return _number_meets(schema, value)
        if kind == "string":
            if not _fits(len(value), schema, "Length"):
                return False
            return self._text(schema, value)
        if kind == "array":
            return self._array(schema, value, depth) if _fits(len(value), schema, "Items") else False
        if kind == "object":
            return self._object(schema, value, depth) if _fits(len(value), schema, "Properties") else False
        return True

    def _text(self, schema: Schema, value: str) -> bool | None:
        results: list[bool | None] = []
        if "pattern" in schema:
            self._effort.letters -= 8 * len(value)
            within_budget = self._effort.letters >= 0
            matched = matches(schema["pattern"], value) if within_budget else None
            # A converted pattern excludes characters that JSON escapes, and all whitespace but the space.
            results.append(matched if matched or _PLAIN.fullmatch(value) else None)
        if isinstance(form := schema.get("format"), str):
            self._effort.letters -= 8 * len(value)
            results.append(has_format(value, form) if self._effort.letters >= 0 else None)
        return _all(results)

    def _array(self, schema: Schema, value: list[Any], depth: int) -> bool | None:
        prefix, rest = tuple_of(schema)
        results = [
            self.admits(prefix[index] if index < len(prefix) else rest, item, depth + 1)
            for index, item in enumerate(value)
        ]
        if schema.get("uniqueItems") is True:
            self._effort.values -= len(value) ** 2 // 8
            if self._effort.values < 0:
                return None
            results.append(not any(is_among(item, value[:index]) for index, item in enumerate(value)))
        if "contains" in schema:
            results.append(self._contains(schema, value, depth))
        return _all([*results, None if "unevaluatedItems" in schema else True])

    def _contains(self, schema: Schema, value: list[Any], depth: int) -> bool | None:
        results = [self.admits(schema["contains"], item, depth + 1) for item in value]
        if None in results:
            return None
        low, high = schema.get("minContains", 1), schema.get("maxContains", len(results))
        return bool(low <= sum(map(bool, results)) <= high)

    def _object(self, schema: Schema, value: dict[str, Any], depth: int) -> bool | None:
        if not all(name in value for name in schema.get("required", ())):
            return False
        properties, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
        unsure = any(
            key in schema
            for key in (
                *("patternProperties", "propertyNames", "unevaluatedProperties"),
                *("dependencies", "dependentRequired", "dependentSchemas"),
            )
        )
        if "patternProperties" in schema:
            rest = True
        results = [self.admits(properties.get(name, rest), child, depth + 1) for name, child in value.items()]
        return _all([*results, None if unsure else True])

    def _joins(self, schema: Schema, value: Any, depth: int) -> Iterable[bool | None]:
        if "$ref" in schema:
            target = self.resolve(schema["$ref"])
            yield None if target is None else self.admits(target, value, depth + 1)
        for member in schema.get("allOf", ()):
            yield self.admits(member, value, depth + 1)
        for keyword in CHOICES:
            if keyword in schema:
                results = [self.admits(choice, value, depth + 1) for choice in schema[keyword]]
                count = results.count(True)
                if keyword == "oneOf" and count > 1:
                    yield False
                elif None in results and (keyword == "oneOf" or not count):
                    yield None
                else:
                    yield bool(count)
        if "not" in schema:
            result = self.admits(schema["not"], value, depth + 1)
            yield None if result is None else not result
        if "if" in schema or CONDITIONS in schema:
            yield None


def target_of(schema: Any, resolve: Resolve) -> Any:
    """Return the schema that ``schema`` refers to, through a few references; None if there is none."""
    for _ in range(_MAX_REFERENCES):
        if not isinstance(schema, dict) or "$ref" not in schema:
            break
        schema = resolve(schema["$ref"])
    return schema


def filter_values(schema: Schema, check: ValueCheck) -> Schema:
    """Remove the values of a converted schema that do not satisfy the keywords beside them, then the keywords
    that no longer have an effect.

    Raises:
        Unsatisfiable: no value remains.
    """
    keyword = "const" if "const" in schema else "enum"
    if not isinstance(values := [schema["const"]] if keyword == "const" else schema.get("enum"), list):
        return schema
    constraints = {key: value for key, value in constraints_of(schema).items() if key != keyword}
    if not constraints:
        return schema
    kept = [value for value in values if check.admits(constraints, value) is not False]
    if not kept:
        raise Unsatisfiable(keyword, "none of its values satisfies the keywords beside it")
    if constraints.keys() == {"type"} and len(kept) == len(values):
        return schema
    decided = {
        key
        for key, value in constraints.items()
        if key != "type" and not any(check.admits({key: value}, candidate) is None for candidate in kept)
    }
    out = {key: value for key, value in schema.items() if key not in decided}
    return out if keyword == "const" else {**out, "enum": kept}


def _all(results: Iterable[bool | None]) -> bool | None:
    results = list(results)
    return False if False in results else None if None in results else True


def _fits(count: int, schema: Schema, suffix: str) -> bool:
    low, high = schema.get(f"min{suffix}", 0), schema.get(f"max{suffix}", count)
    return bool(low <= count <= high)


def _number_meets(schema: Schema, value: float) -> bool:
    meets = (
        value >= schema.get("minimum", value)
        and value <= schema.get("maximum", value)
        and ("exclusiveMinimum" not in schema or value > schema["exclusiveMinimum"])
        and ("exclusiveMaximum" not in schema or value < schema["exclusiveMaximum"])
    )
    step = schema.get("multipleOf")
    return bool(meets and (not step or exact(value) % exact(step) == 0))
