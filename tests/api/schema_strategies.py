"""Random JSON schemas with few names and values, so that keywords often interact."""

from __future__ import annotations

import random
from typing import Any

_NAMES = ("a", "b", "c")
_VALUES: tuple[Any, ...] = (None, True, False, 0, 1, 2, 7, 1.5, "", "a", "b", "abc", "x1")
_PATTERNS = ("^[a-c]+$", "^[a-z][a-z0-9]*$", "^(a|bc){1,3}$", "b", "^x")
_KINDS = ("object", "object", "object", "array", "string", "integer", "number", "boolean")
_RARE = (
    *("pattern", "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    *("uniqueItems", "prefixItems", "minProperties", "maxProperties", "propertyNames", "patternProperties"),
    *(
        "dependentRequired",
        "dependentSchemas",
        "unevaluatedProperties",
        "not",
        "if",
        "enum",
        "const",
        "oneOf",
    ),
)


class Schemas:
    """A generator of random schemas."""

    def __init__(self, chance: random.Random, *, typed: bool = False) -> None:
        """``typed``: every schema has ``type``."""
        self._chance = chance
        self._typed = typed
        self._often = {key: chance.random() < 0.3 for key in _RARE}

    def _includes(self, key: str, share: float) -> bool:
        """Whether to add ``key``, with probability ``share``. A document uses only some rare keywords."""
        return self._often.get(key, True) and self._chance.random() < share

    def document(self) -> dict[str, Any]:
        """A schema with definitions that it may refer to."""
        out = self.schema(0)
        return {**out, "$defs": {name: self.schema(2, "object") for name in ("A", "B")}}

    def schema(self, depth: int, kind: str = "") -> dict[str, Any]:
        """A schema of ``kind``, by default of a random one."""
        chance = self._chance
        out: dict[str, Any] = {}
        kind = kind or chance.choice(_KINDS)
        if depth > 2 and kind in ("object", "array"):
            kind = "string"
        if depth < 4 and chance.random() < 0.3:
            one_of = "oneOf" if self._includes("oneOf", 1) else "anyOf"
            join = chance.choice(("anyOf", one_of, "allOf", "allOf", "$ref"))
            if join == "$ref":
                out["$ref"] = chance.choice(("#/$defs/A", "#/$defs/B"))
            else:
                shared = kind if join == "allOf" or chance.random() < 0.7 else ""
                out[join] = [self.schema(depth + 1, shared) for _ in range(chance.randint(1, 3))]
            if chance.random() < 0.4:
                return out
        kind = chance.choice(
            ("object", "object", "object", "array", "string", "integer", "number", "boolean")
        )
        if depth > 2 and kind in ("object", "array"):
            kind = "string"
        out |= self._of_kind(kind, depth)
        roll = chance.random()
        if roll < 0.7:
            out["type"] = kind
        elif roll < 0.9 or self._typed:
            out["type"] = [
                kind,
                chance.choice([other for other in ("null", "string", "integer") if other != kind]),
            ]
        if self._includes("enum", 0.3):
            out["enum"] = chance.sample(_VALUES, chance.randint(1, 6))
        if self._includes("const", 0.12):
            out["const"] = chance.choice(_VALUES)
        if self._includes("not", 0.15):
            out["not"] = chance.choice(
                ({"type": "null"}, {"required": ["a"]}, {"enum": ["a", 1]}, {"const": 0})
            )
        return out

    def _of_kind(self, kind: str, depth: int) -> dict[str, Any]:
        if kind == "object":
            return self._object(depth)
        if kind == "array":
            return self._array(depth)
        chance = self._chance
        if kind == "string":
            keywords = {
                "minLength": chance.randint(0, 2),
                "maxLength": chance.randint(2, 4),
                "pattern": chance.choice(_PATTERNS),
                "format": chance.choice(("email", "ipv4", "uuid", "unknown")),
            }
        elif kind in ("integer", "number"):
            keywords = {
                "minimum": chance.choice((0, 1, -3, 0.5)),
                "maximum": chance.choice((4, 5, 7.5, 10)),
                "exclusiveMinimum": chance.choice((0, 1, 0.5)),
                "exclusiveMaximum": chance.choice((3, 9)),
                "multipleOf": chance.choice((1, 2, 0.5)),
            }
        else:
            return {}
        return {key: value for key, value in keywords.items() if self._includes(key, 0.4)}

    def _array(self, depth: int) -> dict[str, Any]:
        chance = self._chance
        out: dict[str, Any] = {}
        if chance.random() < 0.6:
            out["items"] = self.schema(depth + 1) if chance.random() < 0.8 else False
        if self._includes("prefixItems", 0.7):
            out["prefixItems"] = [self.schema(depth + 1) for _ in range(chance.randint(1, 2))]
        for key, most in (("minItems", 3), ("maxItems", 4)):
            if chance.random() < 0.3:
                out[key] = chance.randint(0, most)
        if self._includes("uniqueItems", 0.2):
            out["uniqueItems"] = chance.choice((True, False))
        return out

    def _object(self, depth: int) -> dict[str, Any]:
        chance = self._chance
        out: dict[str, Any] = {}
        if chance.random() < 0.85:
            out["properties"] = {
                name: self.schema(depth + 1) for name in chance.sample(_NAMES, chance.randint(1, 3))
            }
        rare: dict[str, Any] = {
            "required": chance.sample(_NAMES, chance.randint(1, 2)),
            "additionalProperties": chance.choice((True, False, {"type": "integer"})),
            "minProperties": chance.randint(0, 2),
            "maxProperties": chance.randint(1, 3),
            "propertyNames": chance.choice(({"enum": ["a", "b"]}, {"maxLength": 1}, {"pattern": "^a"})),
            "patternProperties": {chance.choice(("^a", "", ".*")): {"type": "string"}},
            "dependentRequired": {chance.choice(_NAMES): [chance.choice(_NAMES)]},
            "dependentSchemas": {chance.choice(_NAMES): {"required": [chance.choice(_NAMES)]}},
            "unevaluatedProperties": chance.choice((True, False)),
        }
        out |= {key: value for key, value in rare.items() if self._includes(key, 0.35)}
        if self._includes("if", 0.3):
            name = chance.choice(_NAMES)
            out.setdefault("properties", {})[name] = {"enum": ["a", "b", 1]}
            out["if"] = {"properties": {name: {"const": "a"}}}
            if chance.random() < 0.5:
                out["if"]["required"] = [name]
            out["then"] = {"required": [chance.choice(_NAMES)]}
            if chance.random() < 0.5:
                out["else"] = {"properties": {"b": {"type": "integer"}}}
        return out
