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

_DEEPEST = 30
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
        self._resolve = resolve
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
        if self._effort.values < 0 or depth > _DEEPEST:
            return None
        kind = kind_of_value(value)
        kinds = kinds_of(schema)
        if kinds is not None and kind not in kinds and not (kind == "integer" and "number" in kinds):
            return False
        if "const" in schema and not same(schema["const"], value):
            return False
        if "enum" in schema and not is_among(value, schema["enum"]):
            return False
        found = [self._of_kind(kind, schema, value, depth)]
        if found[0] is not False:
            found += self._joins(schema, value, depth)
        return _all(found)

    def _of_kind(self, kind: str, schema: Schema, value: Any, depth: int) -> bool | None:
        if kind in ("integer", "number"):
            return _number_meets(schema, value)
        if kind == "string":
            if not _within(len(value), schema, "Length"):
                return False
            return self._text(schema, value)
        if kind == "array":
            return self._array(schema, value, depth) if _within(len(value), schema, "Items") else False
        if kind == "object":
            return self._object(schema, value, depth) if _within(len(value), schema, "Properties") else False
        return True

    def _text(self, schema: Schema, value: str) -> bool | None:
        found: list[bool | None] = []
        if "pattern" in schema:
            self._effort.letters -= 8 * len(value)
            known = self._effort.letters >= 0
            met = matches(schema["pattern"], value) if known else None
            # A converted pattern excludes characters that JSON escapes, and all whitespace but the space.
            found.append(met if met or _PLAIN.fullmatch(value) else None)
        if isinstance(form := schema.get("format"), str):
            self._effort.letters -= 8 * len(value)
            found.append(has_format(value, form) if self._effort.letters >= 0 else None)
        return _all(found)

    def _array(self, schema: Schema, value: list[Any], depth: int) -> bool | None:
        prefix, rest = tuple_of(schema)
        found = [
            self.admits(prefix[place] if place < len(prefix) else rest, item, depth + 1)
            for place, item in enumerate(value)
        ]
        if schema.get("uniqueItems") is True:
            self._effort.values -= len(value) ** 2 // 8
            if self._effort.values < 0:
                return None
            found.append(not any(is_among(one, value[:place]) for place, one in enumerate(value)))
        if "contains" in schema:
            found.append(self._contains(schema, value, depth))
        return _all([*found, None if "unevaluatedItems" in schema else True])

    def _contains(self, schema: Schema, value: list[Any], depth: int) -> bool | None:
        met = [self.admits(schema["contains"], one, depth + 1) for one in value]
        if None in met:
            return None
        fewest, most = schema.get("minContains", 1), schema.get("maxContains", len(met))
        return bool(fewest <= sum(map(bool, met)) <= most)

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
        found = [self.admits(properties.get(name, rest), one, depth + 1) for name, one in value.items()]
        return _all([*found, None if unsure else True])

    def _joins(self, schema: Schema, value: Any, depth: int) -> Iterable[bool | None]:
        if "$ref" in schema:
            target = self._resolve(schema["$ref"])
            yield None if target is None else self.admits(target, value, depth + 1)
        for member in schema.get("allOf", ()):
            yield self.admits(member, value, depth + 1)
        for keyword in CHOICES:
            if keyword in schema:
                found = [self.admits(one, value, depth + 1) for one in schema[keyword]]
                certain = found.count(True)
                if keyword == "oneOf" and certain > 1:
                    yield False
                elif None in found and (keyword == "oneOf" or not certain):
                    yield None
                else:
                    yield bool(certain)
        if "not" in schema:
            met = self.admits(schema["not"], value, depth + 1)
            yield None if met is None else not met
        if "if" in schema or CONDITIONS in schema:
            yield None


def filter_values(schema: Schema, check: ValueCheck) -> Schema:
    """Remove the values of a converted schema that do not satisfy the keywords beside them, then the keywords
    that no longer have an effect.

    Raises:
        Unsatisfiable: no value remains.
    """
    keyword = "const" if "const" in schema else "enum"
    if not isinstance(values := [schema["const"]] if keyword == "const" else schema.get("enum"), list):
        return schema
    beside = {key: value for key, value in constraints_of(schema).items() if key != keyword}
    if not beside:
        return schema
    kept = [value for value in values if check.admits(beside, value) is not False]
    if not kept:
        raise Unsatisfiable(keyword, "none of its values satisfies the keywords beside it")
    if beside.keys() == {"type"} and len(kept) == len(values):
        return schema
    decided = {
        key
        for key, value in beside.items()
        if key != "type" and not any(check.admits({key: value}, one) is None for one in kept)
    }
    out = {key: value for key, value in schema.items() if key not in decided}
    return out if keyword == "const" else {**out, "enum": kept}


def _all(found: Iterable[bool | None]) -> bool | None:
    found = list(found)
    return False if False in found else None if None in found else True


def _within(count: int, schema: Schema, what: str) -> bool:
    least, most = schema.get(f"min{what}", 0), schema.get(f"max{what}", count)
    return bool(least <= count <= most)


def _number_meets(schema: Schema, value: float) -> bool:
    meets = (
        value >= schema.get("minimum", value)
        and value <= schema.get("maximum", value)
        and ("exclusiveMinimum" not in schema or value > schema["exclusiveMinimum"])
        and ("exclusiveMaximum" not in schema or value < schema["exclusiveMaximum"])
    )
    step = schema.get("multipleOf")
    return bool(meets and (not step or exact(value) % exact(step) == 0))
