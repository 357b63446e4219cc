"""Converts what a JSON schema requires of an object that has a certain property or value. Pure."""

from __future__ import annotations

from typing import Any

from sollold.api.grammar.keywords import CONDITIONS, JOINS, Schema, constraints_of, is_among, values_of
from sollold.api.grammar.object_properties import MOST_NAMES, is_closed, properties_of
from sollold.api.grammar.settled import Settled
from sollold.api.grammar.values import Resolve, target_of

_MAX_DEPTH = 8
_RULES = ("dependentRequired", "dependentSchemas", "dependencies", CONDITIONS)
_SAME_OBJECT = frozenset(("required", "properties", "allOf", "anyOf", "oneOf", "then", "else", *_RULES[:3]))


def declare_dependent_names(settled: Settled, resolve: Resolve) -> None:
    """Give names that may be required later a schema from the beginning, so that decisions based on the known
    names remain valid.
    """
    schema = settled.schema
    if "properties" not in schema or schema.get("additionalProperties") is False:
        return
    waiting: list[tuple[Any, int]] = [(schema.get(keyword), 0) for keyword in _RULES]
    rest = schema.get("additionalProperties", True)
    names: dict[str, Any] = {}
    while waiting and len(waiting) < MOST_NAMES:
        node, depth = waiting.pop()
        if isinstance(node, list):
            names |= dict.fromkeys(name for name in node if isinstance(name, str))
            waiting += [(inner, depth + 1) for inner in node if not isinstance(inner, str)]
        elif isinstance(node, dict) and depth < _MAX_DEPTH:
            # In a map, look at all schemas and lists; in a schema, at keywords about the same object.
            inner = node if depth == 0 else {key: value for key, value in node.items() if key in _SAME_OBJECT}
            names |= dict.fromkeys(inner.get("properties", ()) if depth else ())
            waiting += [
                (value, depth + 1) for key, value in inner.items() if not depth or key != "properties"
            ]
            if depth and isinstance(reference := node.get("$ref"), str):
                waiting.append((resolve(reference), depth + 1))
    further = rest if isinstance(rest, dict) else {}
    missing = {name: further for name in names if name not in schema["properties"]}
    if missing:
        settled.set(properties={**schema["properties"], **missing})


def settle_dependents(settled: Settled) -> None:
    """Convert what a property's presence requires to a choice: the property is absent, or that holds."""
    schema = settled.schema
    if settled.alternatives is not None:
        return
    for keyword in ("dependentRequired", "dependentSchemas", "dependencies"):
        dependents = schema.get(keyword)
        if not isinstance(dependents, dict):
            continue
        for name, demanded in dependents.items():
            rest = {key: value for key, value in dependents.items() if key != name}
            then = {"required": demanded} if isinstance(demanded, list) else demanded
            if not isinstance(then, dict):
                continue
            is_required = name in schema.get("required", ())
            if not is_required and not is_closed(schema):
                continue
            settled.set(**{keyword: rest or None})
            present = {"allOf": [{"required": [name]}, then]}
            if is_required:
                settled.alternatives = [present]
            elif name in properties_of(schema):
                settled.alternatives = [{"properties": {name: False}}, present]
            else:
                schema = settled.schema
                dependents = rest
                continue
            return


def settle_conditions(settled: Settled, resolve: Resolve) -> None:
    """Convert an ``if`` about one property's presence or listed values to a choice."""
    conditions = settled.schema.get(CONDITIONS)
    if not conditions or not is_closed(settled.schema):
        return
    for index, (condition, then, else_) in enumerate(conditions):
        choices = _choices(settled.schema, condition, then, else_, resolve)
        if choices is not None:
            remaining = [*conditions[:index], *conditions[index + 1 :]]
            settled.set(**{CONDITIONS: remaining or None})
            settled.alternatives = choices
            return


def _choices(schema: Schema, condition: Any, then: Any, else_: Any, resolve: Resolve) -> list[Schema] | None:
    if not isinstance(condition, dict) or condition.keys() & JOINS or schema.get("type") != "object":
        return None
    if constraints_of(condition).keys() - {"properties", "required", "type"}:
        return None
    tested = condition.get("properties", {})
    required = condition.get("required", [])
    if condition.get("type", "object") != "object" or len({*tested, *required}) != 1:
        return None
    (name,) = {*tested, *required}
    own = properties_of(schema).get(name)
    then, else_ = ({} if branch is True else branch for branch in (then, else_))
    if own is None or not isinstance(then, dict) or not isinstance(else_, dict):
        return None
    absent = {"allOf": [{"properties": {name: False}}, else_ if required else then]}
    found = [] if name in schema.get("required", ()) else [absent]
    if not tested:
        return [*found, {"allOf": [{"required": [name]}, then]}]
    values, listed = _values(own, resolve), _values(tested[name], resolve)
    if values is None or listed is None or constraints_of(tested[name]).keys() - {"const", "enum", "type"}:
        return None
    for part, demanded in (
        ([value for value in values if is_among(value, listed)], then),
        ([value for value in values if not is_among(value, listed)], else_),
    ):
        if part:
            chosen = {"properties": {name: {"enum": part}}, "required": [name]}
            found.append({"allOf": [chosen, demanded]})
    return found


def _values(schema: Any, resolve: Resolve) -> list[Any] | None:
    schema = target_of(schema, resolve)
    if not isinstance(schema, dict) or schema.keys() & JOINS:
        return None
    values = values_of(schema)
    return values if values is not None and len(values) <= MOST_NAMES else None
