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
from sollold.api.grammar.keywords import CONSTRAINTS, KIND_OF, Schema, constrains, kinds_of, type_of
from sollold.api.grammar.settle_arrays import settle_array
from sollold.api.grammar.settle_denied import settle_denied
from sollold.api.grammar.settle_objects import settle_object
from sollold.api.grammar.settle_scalars import settle_number, settle_text
from sollold.api.grammar.settled import Settled
from sollold.api.grammar.values import ValueCheck


def settle(schema: Schema, check: ValueCheck, *, formats: bool = True) -> Settled:
    """Convert ``schema`` to such keywords, as far as possible; ``formats``: set the patterns of formats.

    Raises:
        Unsatisfiable: no value satisfies ``schema``.
    """
    if not _needs_settling(schema):
        return Settled(schema)
    settled = Settled(_without_denied_types(_with_type(with_rest(schema))))
    settle_denied(settled)
    if settled.alternatives is not None:
        return settled
    for kind, step in (
        ("number", settle_number),
        ("string", partial(settle_text, formats=formats)),
        ("array", partial(settle_array, check=check, many=formats)),
    ):
        if _allows(kind, settled.schema):
            _settle_kind(settled, kind, step)
    if _allows("object", settled.schema) and settled.alternatives is None:
        _settle_kind(settled, "object", partial(settle_object, check=check))
    if settled.alternatives is None and "type" not in schema and schema.keys() & _STRUCTURE:
        rest = {key: value for key, value in settled.schema.items() if key != "type"}
        settled.schema = schema if rest == schema else settled.schema
    return settled


_STRUCTURE = frozenset(("properties", "items", "prefixItems"))
"""Keywords from which llama.cpp infers the type."""


_PLAIN = frozenset(("properties", "required", "additionalProperties", "items", "minItems", "maxItems"))


def _needs_settling(schema: Schema) -> bool:
    """Whether a schema may have keywords that llama.cpp does not read; fast, since most have none."""
    if not isinstance(kind := schema.get("type"), str):
        return "type" in schema or not schema.keys().isdisjoint(CONSTRAINTS)
    constraints = schema.keys() & CONSTRAINTS
    constraints.discard("type")
    if kind == "object" and constraints <= _PLAIN:
        properties = schema.get("properties", _EMPTY)
        return (
            any(name not in properties for name in schema.get("required", ())) or False in properties.values()
        )
    if kind == "array" and constraints <= _PLAIN:
        return isinstance(schema.get("items"), list | bool) or schema.get("minItems", 0) > schema.get(
            "maxItems", math.inf
        )
    return bool(constraints)


_EMPTY: Schema = {}


def _settle_kind(settled: Settled, kind: str, step: Callable[[Settled], None]) -> None:
    """Apply ``step`` to the values of one type; drop the type if it is impossible but others are allowed."""
    schema, problems, notes = settled.schema, len(settled.problems), len(settled.notes)
    try:
        step(settled)
    except Unsatisfiable:
        if (reduced := without_kind(schema, kind)) is None:
            raise
        settled.schema, settled.alternatives = reduced, None
        del settled.problems[problems:], settled.notes[notes:]


def without_kind(schema: Schema, kind: str) -> Schema | None:
    """Return the schema without the type ``kind``; None if it does not name ``kind`` and other types."""
    names = kinds_of(schema) or []
    removed = ("number", "integer") if kind == "number" else (kind,)
    kinds = [name for name in names if name not in removed]
    if not kinds or len(kinds) == len(names):
        return None
    out = {**schema, "type": type_of(kinds)}
    return {key: value for key, value in out.items() if key not in KIND_OF or constrains(key, kinds)}


def _with_type(schema: Schema) -> Schema:
    """Add the type array or object if the keywords imply it: llama.cpp infers it only from some of them."""
    if "type" in schema:
        return schema
    implied = {
        KIND_OF[key]
        for key, value in schema.items()
        if key in KIND_OF and key not in _UNTYPED and value is not _NO_EFFECT.get(key)
    }
    if len(implied) == 1 and (kind := implied.pop()) in ("array", "object"):
        return {"type": kind, **schema}
    return schema


_UNTYPED = frozenset(("format",))
_NO_EFFECT = {
    "uniqueItems": False,
    **dict.fromkeys(("items", "additionalItems", "additionalProperties"), True),
}


def _allows(kind: str, schema: Schema) -> bool:
    kinds = kinds_of(schema)
    return kinds is None or kind in kinds or (kind == "number" and "integer" in kinds)


def _without_denied_types(schema: Schema) -> Schema:
    """Replace a ``not`` of types by the kept types."""
    denied: Any = schema.get("not")
    if not isinstance(denied, dict) or {*denied} - {"type", "title", "description"} or "type" not in denied:
        return schema
    kinds, excluded = kinds_of(schema), kinds_of(denied) or []
    if kinds is None or ("integer" in excluded and "number" in kinds):
        return schema
    kept = [
        kind for kind in kinds if kind not in excluded and not (kind == "integer" and "number" in excluded)
    ]
    rest = {key: value for key, value in schema.items() if key not in ("not", "type")}
    if not kept:
        raise Unsatisfiable("not", "it excludes all types")
    return {"type": type_of(kept), **rest}
