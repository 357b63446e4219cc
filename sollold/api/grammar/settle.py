"""Converts a JSON schema without choices to the keywords that llama.cpp reads. Pure.

llama.cpp reads the bounds of integers but not of numbers, a pattern but no length beside it, either
``prefixItems`` or ``items``, and for objects ``properties``, ``required`` and ``additionalProperties``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from sollold.api.grammar.join import Unsatisfiable, with_rest
from sollold.api.grammar.keywords import CONSTRAINTS, KIND_OF, Schema, constrains, kinds_of
from sollold.api.grammar.settle_arrays import settle_array
from sollold.api.grammar.settle_denied import settle_denied
from sollold.api.grammar.settle_objects import settle_object
from sollold.api.grammar.settle_scalars import settle_number, settle_text
from sollold.api.grammar.settled import Settled
from sollold.api.grammar.values import Resolve, ValueCheck


def settle(schema: Schema, resolve: Resolve, check: ValueCheck, *, formats: bool = True) -> Settled:
    """Convert ``schema`` to such keywords, as far as possible; ``formats``: set the patterns of formats.

    Raises:
        Unsatisfiable: no value satisfies ``schema``.
    """
    if not _may_need(schema):
        return Settled(schema)
    settled = Settled(_without_denied_types(_with_type(with_rest(schema))))
    settle_denied(settled)
    if settled.alternatives is not None:
        return settled
    for kind, step in (
        ("number", settle_number),
        ("string", partial(settle_text, formats=formats)),
        ("array", partial(settle_array, resolve=resolve, check=check, many=formats)),
    ):
        if _may_be(kind, settled.schema):
            _settle_kind(settled, kind, step)
    if _may_be("object", settled.schema) and settled.alternatives is None:
        _settle_kind(settled, "object", partial(settle_object, resolve=resolve, check=check))
    if settled.alternatives is None and "type" not in schema and schema.keys() & _STRUCTURE:
        rest = {key: value for key, value in settled.schema.items() if key != "type"}
        settled.schema = schema if rest == schema else settled.schema
    return settled


_STRUCTURE = frozenset(("properties", "items", "prefixItems"))
"""Keywords from which llama.cpp infers the type."""


_PLAIN = frozenset(("properties", "required", "additionalProperties", "items", "minItems", "maxItems"))


def _may_need(schema: Schema) -> bool:
    """Whether a schema may have keywords that llama.cpp does not read; fast, since most have none."""
    if not isinstance(kind := schema.get("type"), str):
        return "type" in schema or not schema.keys().isdisjoint(CONSTRAINTS)
    found = schema.keys() & CONSTRAINTS
    found.discard("type")
    if kind == "object" and found <= _PLAIN:
        properties = schema.get("properties", _NOTHING)
        return (
            any(name not in properties for name in schema.get("required", ())) or False in properties.values()
        )
    if kind == "array" and found <= _PLAIN:
        return isinstance(schema.get("items"), list | bool) or schema.get("minItems", 0) > schema.get(
            "maxItems", math.inf
        )
    return bool(found)


_NOTHING: Schema = {}


def _settle_kind(settled: Settled, kind: str, step: Callable[[Settled], None]) -> None:
    """Apply ``step`` to the values of one type; drop the type if it is impossible but others are allowed."""
    before, problems, notes = settled.schema, len(settled.problems), len(settled.notes)
    try:
        step(settled)
    except Unsatisfiable:
        if (left := without_kind(before, kind)) is None:
            raise
        settled.schema, settled.alternatives = left, None
        del settled.problems[problems:], settled.notes[notes:]


def without_kind(schema: Schema, kind: str) -> Schema | None:
    """Return the schema for values of its other types; None if it does not name ``kind`` and others."""
    named = kinds_of(schema) or []
    gone = ("number", "integer") if kind == "number" else (kind,)
    left = [one for one in named if one not in gone]
    if not left or len(left) == len(named):
        return None
    out = {**schema, "type": left[0] if len(left) == 1 else left}
    return {key: value for key, value in out.items() if key not in KIND_OF or constrains(key, left)}


def _with_type(schema: Schema) -> Schema:
    """Add the type array or object if the keywords imply it: llama.cpp infers it only from some of them."""
    if "type" in schema:
        return schema
    spoken = {
        KIND_OF[key]
        for key, value in schema.items()
        if key in KIND_OF and key not in _OF_NO_TYPE and value is not _FORBIDS_NOTHING.get(key)
    }
    if len(spoken) == 1 and (kind := spoken.pop()) in ("array", "object"):
        return {"type": kind, **schema}
    return schema


_OF_NO_TYPE = frozenset(("format",))
_FORBIDS_NOTHING = {
    "uniqueItems": False,
    **dict.fromkeys(("items", "additionalItems", "additionalProperties"), True),
}


def _may_be(kind: str, schema: Schema) -> bool:
    kinds = kinds_of(schema)
    return kinds is None or kind in kinds or (kind == "number" and "integer" in kinds)


def _without_denied_types(schema: Schema) -> Schema:
    """Replace a ``not`` of types by the remaining types."""
    denied: Any = schema.get("not")
    if not isinstance(denied, dict) or {*denied} - {"type", "title", "description"} or "type" not in denied:
        return schema
    kinds, without = kinds_of(schema), kinds_of(denied) or []
    if kinds is None or ("integer" in without and "number" in kinds):
        return schema
    left = [kind for kind in kinds if kind not in without and not (kind == "integer" and "number" in without)]
    rest = {key: value for key, value in schema.items() if key not in ("not", "type")}
    if not left:
        raise Unsatisfiable("not", "it excludes all types")
    return {"type": left[0] if len(left) == 1 else left, **rest}
