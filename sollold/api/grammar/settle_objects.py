"""Objects of a JSON schema in the keywords that llama.cpp reads. Pure.

Of an object with ``properties`` and without ``additionalProperties`` llama.cpp writes no others: so it can be
said there that one is missing.
"""

from __future__ import annotations

import math
from typing import Any

from sollold.api.grammar.join import Impossible, both
from sollold.api.grammar.keywords import CONDITIONS, JOINS, Schema, constraints_of, is_among, values_of
from sollold.api.grammar.settled import Settled
from sollold.api.grammar.values import Resolve, ValueCheck

_ANY_NAME = frozenset(("", ".*", "^.*", ".*$", "^.*$", "^", "$"))
_MOST_CHOICES = 16
_MOST_NAMES = 256
_DEEPEST_DEMAND = 8
_LATER = ("dependentRequired", "dependentSchemas", "dependencies", CONDITIONS)
_SAME_OBJECT = frozenset(("required", "properties", "allOf", "anyOf", "oneOf", "then", "else", *_LATER[:3]))


def settle_object(settled: Settled, resolve: Resolve, check: ValueCheck) -> None:
    """Names, numbers of properties, and what depends on a property.

    Raises:
        Impossible: no object meets it.
    """
    _leave_out(settled, [name for name, one in _properties(settled.schema).items() if one is False])
    _all_names(settled)
    _matched_names(settled)
    _names(settled, resolve, check)
    _foreseen(settled, resolve)
    for step in (_required, _forbidden, _counts, _dependents):
        step(settled)
        if settled.alternatives is not None:
            return
    _conditions(settled, resolve)


def _properties(schema: Schema) -> dict[str, Any]:
    found: dict[str, Any] = schema.get("properties", {})
    return found


def _is_closed(schema: Schema) -> bool:
    """Whether llama.cpp writes no properties but those that have a schema."""
    rest = schema.get("additionalProperties")
    return rest is False or (rest is None and "properties" in schema)


def _all_names(settled: Settled) -> None:
    """A pattern of any name speaks of all properties."""
    patterns = settled.schema.get("patternProperties")
    if not isinstance(patterns, dict):
        return
    rest: Any = True
    for name in _ANY_NAME & patterns.keys():
        rest = both(rest, patterns[name])
    left = {name: one for name, one in patterns.items() if name not in _ANY_NAME}
    if len(left) == len(patterns):
        return
    properties = {name: both(one, rest) for name, one in _properties(settled.schema).items()}
    settled.set(properties=properties or None, patternProperties=left or None, additionalProperties=rest)


def _matched_names(settled: Settled) -> None:
    """Names that only patterns allow: where there are no others each may be written, with a value that one of
    the patterns demands. The grammar would allow none, and the object would always be empty.
    """
    schema = settled.schema
    patterns = schema.get("patternProperties")
    if not patterns or _properties(schema) or schema.get("additionalProperties") is not False:
        return
    values = [*patterns.values()]
    found = [one for place, one in enumerate(values[:_MOST_CHOICES]) if one not in values[:place]]
    if len(values) > _MOST_CHOICES:
        found = [{}]
    settled.set(additionalProperties=found[0] if len(found) == 1 else {"anyOf": found})


def _names(settled: Settled, resolve: Resolve, check: ValueCheck) -> None:
    """The names that ``propertyNames`` lists or lets through."""
    schema = settled.schema
    if not isinstance(names := schema.get("propertyNames"), dict):
        return
    target = (resolve(names["$ref"]) or {}) if "$ref" in names and not constraints_of(names) else names
    properties, rest = _properties(schema), schema.get("additionalProperties", True)
    listed = values_of(target) if target.keys() & {"enum", "const"} and not target.keys() & JOINS else None
    if listed is not None and len(listed) <= _MOST_NAMES and "patternProperties" not in schema:
        allowed = [
            name for name in listed if isinstance(name, str) and check.admits(target, name) is not False
        ]
        given = {name: one for name, one in properties.items() if name in allowed}
        if not _is_closed(schema):
            further = rest if isinstance(rest, dict) else {}
            given |= {name: further for name in allowed if name not in given}
        settled.set(properties=given, additionalProperties=False, propertyNames=None)
        return
    if _is_closed(schema):
        verdicts = {name: check.admits(target, name) for name in properties}
        if None not in verdicts.values():
            kept = {name: one for name, one in properties.items() if verdicts[name]}
            settled.set(properties=kept, propertyNames=None)


def _foreseen(settled: Settled, resolve: Resolve) -> None:
    """Names that something may demand later have a schema from the beginning, so that what is decided by the
    names that there are holds.
    """
    schema = settled.schema
    if "properties" not in schema or schema.get("additionalProperties") is False:
        return
    waiting: list[tuple[Any, int]] = [(schema.get(keyword), 0) for keyword in _LATER]
    rest = schema.get("additionalProperties", True)
    names: dict[str, Any] = {}
    while waiting and len(waiting) < _MOST_NAMES:
        one, depth = waiting.pop()
        if isinstance(one, list):
            names |= dict.fromkeys(name for name in one if isinstance(name, str))
            waiting += [(inner, depth + 1) for inner in one if not isinstance(inner, str)]
        elif isinstance(one, dict) and depth < _DEEPEST_DEMAND:
            # Of a map of schemas or lists all are looked at, of a schema what speaks of the same object.
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


def _required(settled: Settled) -> None:
    """Required properties need a schema of their own."""
    schema = settled.schema
    properties, rest = _properties(schema), schema.get("additionalProperties", True)
    missing = [name for name in schema.get("required", ()) if name not in properties]
    if not missing:
        return
    if rest is False:
        if "patternProperties" not in schema:
            raise Impossible("required", f"{missing[0][:40]!r} is not allowed")
        return
    further = rest if isinstance(rest, dict) else {}
    if "properties" not in schema:
        # Without any there were all.
        settled.set(additionalProperties=rest)
    settled.set(properties={**properties, **dict.fromkeys(missing, further)})


def _forbidden(settled: Settled) -> None:
    """Properties that must not be there: ``not`` of what demands one."""
    denied = settled.schema.get("not")
    choices = denied.get("anyOf", [denied]) if isinstance(denied, dict) else []
    if not choices or not all(
        isinstance(one, dict)
        and constraints_of(one).keys() <= {"required", "type"}
        and not one.keys() & JOINS
        for one in choices
    ):
        return
    names = [one.get("required", ()) for one in choices]
    closed = _is_closed(settled.schema)
    if any(len(each) != 1 for each in names) or any(one.get("type", "object") != "object" for one in choices):
        return
    if settled.schema.get("type") != "object" or not closed:
        return
    _leave_out(settled, [each[0] for each in names])
    settled.set(**{"not": None})


def _leave_out(settled: Settled, names: list[str]) -> None:
    schema = settled.schema
    if not names:
        return
    gone = {*names}
    for name in schema.get("required", ()):
        if name in gone:
            raise Impossible("required", f"{name[:40]!r} is not allowed")
    settled.set(properties={key: one for key, one in _properties(schema).items() if key not in gone})
    if "additionalProperties" not in schema:
        # Nothing that is joined later brings them back.
        settled.set(additionalProperties=False)


def _counts(settled: Settled) -> None:
    """Numbers of properties, where those that may be missing are few."""
    schema = settled.schema
    if not _is_closed(schema):
        if schema.get("minProperties", 0) <= len(schema.get("required", ())):
            settled.set(minProperties=None)
        return
    properties = _properties(schema)
    required = dict.fromkeys(name for name in schema.get("required", ()) if name in properties)
    optional = [name for name in properties if name not in required]
    least, most = schema.get("minProperties", 0), schema.get("maxProperties", math.inf)
    if least > min(most, len(properties)) or most < len(required):
        raise Impossible(
            "minProperties" if least else "maxProperties", "there is no such number of properties"
        )
    if most >= len(properties):
        settled.set(maxProperties=None)
    elif most == len(required):
        _leave_out(settled, optional)
        settled.set(maxProperties=None)
    if least <= len(required):
        settled.set(minProperties=None)
    elif least == len(properties):
        settled.set(minProperties=None, required=[*required, *optional])
    elif least == len(required) + 1 and len(optional) <= _MOST_CHOICES and schema.get("type") == "object":
        settled.set(minProperties=None)
        settled.alternatives = [{"required": [name]} for name in optional]


def _dependents(settled: Settled) -> None:
    """What is demanded once a property is there: a choice between its absence and that."""
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
            if not present and not _is_closed(schema):
                continue
            settled.set(**{keyword: left or None})
            there = {"allOf": [{"required": [name]}, then]}
            if present:
                settled.alternatives = [there]
            elif name in _properties(schema):
                settled.alternatives = [{"properties": {name: False}}, there]
            else:
                schema = settled.schema
                found = left
                continue
            return


def _conditions(settled: Settled, resolve: Resolve) -> None:
    """``if`` of a property that has listed values: a choice of them."""
    conditions = settled.schema.get(CONDITIONS)
    if not conditions or not _is_closed(settled.schema):
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
    own = _properties(schema).get(name)
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
    return values if values is not None and len(values) <= _MOST_NAMES else None
