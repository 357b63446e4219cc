"""Converts what a JSON schema requires of an object that has a certain property or value. Pure."""

from __future__ import annotations

from typing import Any

from sollold.api.grammar.keywords import CONDITIONS, JOINS, Schema, constraints_of, is_among, values_of
from sollold.api.grammar.object_properties import MOST_NAMES, is_closed, properties_of
from sollold.api.grammar.settled import Settled
from sollold.api.grammar.values import Resolve

_DEEPEST_DEMAND = 8
_LATER = ("dependentRequired", "dependentSchemas", "dependencies", CONDITIONS)
_SAME_OBJECT = frozenset(("required", "properties", "allOf", "anyOf", "oneOf", "then", "else", *_LATER[:3]))


def declare_dependent_names(settled: Settled, resolve: Resolve) -> None:
    """Give names that may be required later a schema from the beginning, so that decisions based on the known
    names remain valid.
    """
    schema = settled.schema
    if "properties" not in schema or schema.get("additionalProperties") is False:
        return
    waiting: list[tuple[Any, int]] = [(schema.get(keyword), 0) for keyword in _LATER]
    rest = schema.get("additionalProperties", True)
    names: dict[str, Any] = {}
    while waiting and len(waiting) < MOST_NAMES:
        one, depth = waiting.pop()
        if isinstance(one, list):
            names |= dict.fromkeys(name for name in one if isinstance(name, str))
            waiting += [(inner, depth + 1) for inner in one if not isinstance(inner, str)]
        elif isinstance(one, dict) and depth < _DEEPEST_DEMAND:
            # In a map, look at all schemas and lists; in a schema, at keywords about the same object.
            inner = one if depth == 0 else {key: value for key, value in one.items() if key in _SAME_OBJECT}
            names |= dict.fromkeys(inner.get("properties", ()) if depth else ())
            waiting += [
                (value, depth + 1) for key, value in inner.items() if not depth or key != "properties"
            ]
            if depth and isinstance(reference := one.get("$ref"), str):
                waiting.append((resolve(reference), depth + 1))
    further = rest if isinstance(rest, dict) else {}
    missing = {name: further for name in names if name not in schema["properties"]}
    if missing:
        settled.set(properties={**schema["properties"], **missing})


def settle_dependents(settled: Settled) -> None:
    """Convert what a property's presence requires to a choice between its absence and that."""
    schema = settled.schema
    if settled.alternatives is not None:
        return
    for keyword in ("dependentRequired", "dependentSchemas", "dependencies"):
        found = schema.get(keyword)
        if not isinstance(found, dict):
            continue
        for name, demanded in found.items():
            left = {key: one for key, one in found.items() if key != name}
            then = {"required": demanded} if isinstance(demanded, list) else demanded
            if not isinstance(then, dict):
                continue
            present = name in schema.get("required", ())
            if not present and not is_closed(schema):
                continue
            settled.set(**{keyword: left or None})
            there = {"allOf": [{"required": [name]}, then]}
            if present:
                settled.alternatives = [there]
            elif name in properties_of(schema):
                settled.alternatives = [{"properties": {name: False}}, there]
            else:
                schema = settled.schema
                found = left
                continue
            return


def settle_conditions(settled: Settled, resolve: Resolve) -> None:
    """Convert an ``if`` about one property's presence or listed values to a choice."""
    conditions = settled.schema.get(CONDITIONS)
    if not conditions or not is_closed(settled.schema):
        return
    for place, (condition, then, other) in enumerate(conditions):
        choices = _choices(settled.schema, condition, then, other, resolve)
        if choices is not None:
            left = [*conditions[:place], *conditions[place + 1 :]]
            settled.set(**{CONDITIONS: left or None})
            settled.alternatives = choices
            return


def _choices(schema: Schema, condition: Any, then: Any, other: Any, resolve: Resolve) -> list[Schema] | None:
    if not isinstance(condition, dict) or condition.keys() & JOINS or schema.get("type") != "object":
        return None
    if constraints_of(condition).keys() - {"properties", "required", "type"}:
        return None
    tested = condition.get("properties", {})
    needed = condition.get("required", [])
    if condition.get("type", "object") != "object" or len({*tested, *needed}) != 1:
        return None
    (name,) = {*tested, *needed}
    own = properties_of(schema).get(name)
    then, other = ({} if one is True else one for one in (then, other))
    if own is None or not isinstance(then, dict) or not isinstance(other, dict):
        return None
    absent = {"allOf": [{"properties": {name: False}}, other if needed else then]}
    found = [] if name in schema.get("required", ()) else [absent]
    if not tested:
        return [*found, {"allOf": [{"required": [name]}, then]}]
    values, wanted = _listed(own, resolve), _listed(tested[name], resolve)
    if values is None or wanted is None or constraints_of(tested[name]).keys() - {"const", "enum", "type"}:
        return None
    for part, demanded in (
        ([value for value in values if is_among(value, wanted)], then),
        ([value for value in values if not is_among(value, wanted)], other),
    ):
        if part:
            chosen = {"properties": {name: {"enum": part}}, "required": [name]}
            found.append({"allOf": [chosen, demanded]})
    return found


def _listed(schema: Any, resolve: Resolve) -> list[Any] | None:
    for _ in range(8):
        if not isinstance(schema, dict) or "$ref" not in schema:
            break
        schema = resolve(schema["$ref"])
    if not isinstance(schema, dict) or schema.keys() & JOINS:
        return None
    values = values_of(schema)
    return values if values is not None and len(values) <= MOST_NAMES else None
