"""A model of llama.cpp's grammars for JSON schemas: which values they accept.

After ``common/json-schema.cpp`` and ``common/json-schema-to-grammar.cpp`` of the pinned build, which read one
keyword of a schema and ignore the others.
"""

from __future__ import annotations

import functools
import math
import random
import re
from typing import Any

from sollold.api.grammar.keywords import kind_of_value, same
from sollold.api.grammar.pattern_length import MOST_REPEATS
from sollold.api.grammar.pointer import at_pointer

FORMATS = {
    "date": r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])",
    "uuid": "[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}",
}
_LETTERS = [chr(code) for code in range(0x20, 0x7F)] + ["é"]
_ATOM = re.compile(r"\[(?:[^\]\\]|\\.)*\]|\\.|.", re.DOTALL)
_QUANTIFIER = re.compile(r"[*+?]|\{(\d+)(?:(,)(\d*))?\}")


class Stuck(Exception):
    """No value is accepted, or it would be nested too deeply."""


class Grammar:
    """The grammar of a schema."""

    def __init__(self, document: dict[str, Any], chance: random.Random | None = None) -> None:
        self._document = document
        self._chance = chance or random.Random(0)

    def kind(self, schema: dict[str, Any]) -> str:
        """The keyword or type that the converter reads."""
        for keyword in ("$ref", "oneOf", "anyOf"):
            if keyword in schema:
                return keyword
        if isinstance(schema.get("type"), list):
            return "types"
        for keyword in ("const", "enum"):
            if keyword in schema:
                return keyword
        kind = schema.get("type")
        objects = "properties" in schema or schema.get("additionalProperties", True) is not True
        if kind is None:
            if objects:
                return "object"
            if "items" in schema or "prefixItems" in schema:
                return "array"
            if {"pattern", "minLength", "maxLength"} & {*schema} or schema.get("format") in FORMATS:
                return "string"
            return "allOf" if "allOf" in schema else "any"
        if kind in ("object", "string") and "allOf" in schema and not (kind == "object" and objects):
            return "allOf"
        return str(kind)

    def choices(self, schema: dict[str, Any]) -> list[dict[str, Any]]:
        """The alternatives."""
        kind = self.kind(schema)
        if kind == "$ref":
            target = at_pointer(self._document, schema["$ref"])
            assert target is not None, schema
            return [target]
        if kind == "types":
            return [{**schema, "type": name} for name in schema["type"]]
        return list(schema[kind])

    def accepts(self, schema: dict[str, Any], value: Any, depth: int = 0) -> bool:
        """Whether the grammar accepts the value."""
        assert isinstance(schema, dict)
        if depth > 60:
            return False
        kind, given = self.kind(schema), kind_of_value(value)
        if kind in ("$ref", "oneOf", "anyOf", "types"):
            return any(self.accepts(choice, value, depth + 1) for choice in self.choices(schema))
        if kind in ("const", "enum"):
            return any(
                same(value, allowed) for allowed in ([schema[kind]] if kind == "const" else schema[kind])
            )
        if kind in ("any", "allOf"):
            return True
        if kind == "number":
            return given in ("integer", "number")
        if kind != given:
            return False
        if kind == "integer":
            low, high = _bounds(schema)
            return bool(low <= value <= high)
        if kind == "string":
            return _accepts_text(schema, value)
        if kind == "array":
            return self._accepts_array(schema, value, depth)
        return kind != "object" or self._accepts_object(schema, value, depth)

    def _accepts_array(self, schema: dict[str, Any], value: list[Any], depth: int) -> bool:
        items = schema.get("items", schema.get("prefixItems", {}))
        if isinstance(items, list):
            return len(items) == len(value) and all(
                self.accepts(choice, item, depth + 1) for choice, item in zip(items, value, strict=True)
            )
        most = schema.get("maxItems", math.inf)
        return schema.get("minItems", 0) <= len(value) <= most and all(
            self.accepts(items, item, depth + 1) for item in value
        )

    def _accepts_object(self, schema: dict[str, Any], value: dict[str, Any], depth: int) -> bool:
        properties = schema.get("properties", {})
        required = [name for name in properties if name in schema.get("required", ())]
        rest = schema.get("additionalProperties", "properties" not in schema)
        rest = {} if rest is True else rest
        if any(name not in value for name in required):
            return False
        return all(
            self.accepts(properties[name], member, depth + 1)
            if name in properties
            else rest is not False and self.accepts(rest, member, depth + 1)
            for name, member in value.items()
        )

    def write(self, schema: dict[str, Any] | None = None, depth: int = 0) -> Any:
        """A random value that the grammar accepts. Raises `Stuck`."""
        schema = self._document if schema is None else schema
        if depth > 12:
            raise Stuck
        chance, kind = self._chance, self.kind(schema)
        if kind in ("$ref", "oneOf", "anyOf", "types"):
            return self.write(chance.choice(self.choices(schema)), depth + 1)
        if kind in ("const", "enum"):
            return schema["const"] if kind == "const" else chance.choice(schema["enum"])
        if kind in ("any", "allOf"):
            return chance.choice(
                [None, True, 0, 3, -1, 2.5, "", "a", "abc", [], [1], {}, {"a": 1}, {"b": "x"}]
            )
        if kind == "number":
            return chance.choice([0, 1, -7, 0.5, 4, 5, 12, 99.25])
        if kind == "integer":
            low, high = _bounds(schema)
            near = [0, 1, -1, 5, 10, 1000, low, high, low + 1, high - 1]
            return int(
                chance.choice([number for number in near if low <= number <= high and abs(number) < math.inf])
            )
        if kind == "string":
            return self._text(schema)
        if kind == "array":
            return self._array(schema, depth)
        if kind == "object":
            return self._object(schema, depth)
        return chance.choice([True, False]) if kind == "boolean" else None

    def _text(self, schema: dict[str, Any]) -> str:
        pattern = schema.get("pattern")
        if pattern is not None:
            return _Writer(pattern[1:-1], self._chance).alternatives()
        if schema.get("format") in FORMATS:
            return _Writer(FORMATS[schema["format"]], self._chance).alternatives()
        least = schema.get("minLength", 0)
        most = min(schema.get("maxLength", math.inf), least + 3)
        return "".join(self._chance.choices("abz", k=self._chance.randint(least, int(most))))

    def _array(self, schema: dict[str, Any], depth: int) -> list[Any]:
        items = schema.get("items", schema.get("prefixItems", {}))
        if isinstance(items, list):
            return [self.write(choice, depth + 1) for choice in items]
        least = schema.get("minItems", 0)
        most = int(min(schema.get("maxItems", math.inf), least + 2))
        return [self.write(items, depth + 1) for _ in range(self._chance.randint(least, most))]

    def _object(self, schema: dict[str, Any], depth: int) -> dict[str, Any]:
        properties = schema.get("properties", {})
        out: dict[str, Any] = {}
        for name, member in properties.items():
            if name in schema.get("required", ()):
                out[name] = self.write(member, depth + 1)
            elif self._chance.random() < (0.5 if depth < 4 else 0.05):
                try:
                    out[name] = self.write(member, depth + 1)
                except Stuck:
                    continue
        rest = schema.get("additionalProperties", "properties" not in schema)
        if rest is not False and self._chance.random() < 0.4:
            name = self._chance.choice("abcdexyz")
            if name not in properties:
                out[name] = self.write({} if rest is True else rest, depth + 1)
        return out


def _bounds(schema: dict[str, Any]) -> tuple[float, float]:
    low, high = -math.inf, math.inf
    if "minimum" in schema:
        low = math.ceil(schema["minimum"])
    elif "exclusiveMinimum" in schema:
        low = math.floor(schema["exclusiveMinimum"]) + 1
    if "maximum" in schema:
        high = math.floor(schema["maximum"])
    elif "exclusiveMaximum" in schema:
        high = math.ceil(schema["exclusiveMaximum"]) - 1
    return low, high


def _accepts_text(schema: dict[str, Any], value: str) -> bool:
    if "pattern" in schema:
        return re.fullmatch(schema["pattern"][1:-1], value) is not None
    if schema.get("format") in FORMATS:
        return re.fullmatch(FORMATS[schema["format"]], value) is not None
    most = schema.get("maxLength", math.inf)
    return bool(schema.get("minLength", 0) <= len(value) <= (most if most <= MOST_REPEATS else math.inf))


class _Writer:
    """Writes a random text that a converted pattern matches."""

    def __init__(self, pattern: str, chance: random.Random) -> None:
        self._text = pattern
        self._position = 0
        self._chance = chance

    def alternatives(self) -> str:
        parts = [self._sequence()]
        while self._text.startswith("|", self._position):
            self._position += 1
            parts.append(self._sequence())
        return self._chance.choice(parts)

    def _sequence(self) -> str:
        out = ""
        while self._position < len(self._text) and self._text[self._position] not in "|)":
            start = self._position
            self._part()
            found = _QUANTIFIER.match(self._text, self._position)
            low, high = _repeats(found)
            end = self._position
            for _ in range(self._chance.randint(low, min(high, low + 3))):
                self._position = start
                out += self._part()
            self._position = end if found is None else found.end()
        return out

    def _part(self) -> str:
        if self._text[self._position] == "(":
            self._position += 1
            inner = self.alternatives()
            self._position += 1
            return inner
        atom = _ATOM.match(self._text, self._position)
        assert atom is not None
        self._position = atom.end()
        return self._chance.choice(_letters(atom[0]))


@functools.cache
def _letters(atom: str) -> list[str]:
    """The characters that an atom of a pattern matches."""
    return [letter for letter in _LETTERS if re.fullmatch(atom, letter)]


def _repeats(quantifier: re.Match[str] | None) -> tuple[int, int]:
    if quantifier is None:
        return 1, 1
    if quantifier[1] is None:
        return int(quantifier[0] == "+"), 1 if quantifier[0] == "?" else 4
    low = int(quantifier[1])
    return low, low if quantifier[2] is None else int(quantifier[3]) if quantifier[3] else low + 4
