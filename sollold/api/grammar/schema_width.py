"""Rejects JSON schemas whose grammar would make an engine hang (see `grammar_width`). Pure."""

from __future__ import annotations

import re
from typing import Any, TypeGuard

from sollold.api.grammar.formats import FORMATS
from sollold.api.grammar.grammar_width import MOST_WAYS, TooManyWays, check_pattern

_MAX_VALUES = MOST_WAYS
"""Maximum values of all enumerations together."""
_MAX_TYPES = 7
"""Length up to which a list of types is not counted as an enumeration; JSON has no more types."""
_MAX_OPTIONAL_SQUARED = 250_000
"""Maximum sum of the squares of the objects' numbers of optional properties, as their grammars grow."""
_MAX_PATTERN_CHARACTERS = 16 * 1024
"""Maximum characters of all patterns together."""
_FORMAT_PATTERNS = frozenset(FORMATS.values())
_FORMAT_DIVISOR = 8
"""Divisor of the length of formats' patterns, which continue in few ways: an engine can use hundreds."""
_MAX_NAME_CHARACTERS = 16 * 1024
"""Maximum characters of the property names of an object that allows others: each letter is compared."""
_MAX_RANGES = 1000
"""Maximum numbers with bounds, which become grammars of their digits."""
_MAX_REPEATS = 1_000_000
"""Maximum sum of all bounds of lengths: each unit becomes a rule."""
_CHOICES = ("anyOf", "oneOf", "allOf")
_ROOTS = frozenset(("schema", "parameters", "input_schema"))
"""Fields whose value is a schema of its own, the root of the references in it."""
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_SPANS = (("minLength", "maxLength"), ("minItems", "maxItems"))
_LENGTHS = tuple(name for span in _SPANS for name in span)
_MAX_LENGTH = 2**31 - 1
"""Maximum bound of a length: engines use only the lower bits of larger ones."""
_MAX_BOUND = 10**15
"""Maximum of an integer's only bound: from a larger one, llama.cpp makes a repetition with min > max."""
_MAX_STEPS = 50_000
_INDEX = re.compile(r"[ \t\n\v\f\r]*\+?0*([0-9]+)")
_MAX_DEPTH = 200
"""Maximum depth of references that lead to one another."""


class TooWide(Exception):
    """An engine would hang on the schema; the message says why."""


def check_schema(value: object) -> None:
    """Check the schemas in ``value``, wherever they are; it must not be nested deeply.

    Raises:
        TooWide: an engine would hang on one of them.
    """
    SchemaWidth().add(value)


class SchemaWidth:
    """Adds up how wide several schemas of one request are: the limits apply to all of them together."""

    def __init__(self) -> None:
        self._totals = (0, 0, 0, 0, 0)

    def add(self, value: object) -> None:
        """Add the schemas in ``value``, as `check_schema`; if it raises, they are not added."""
        values, squares, letters, ranges, repeats = self._totals
        followed: dict[tuple[int, str], bool] = {}
        waiting: list[tuple[Any, Any]] = [(value, value)]
        while waiting:
            node, root = waiting.pop()
            if isinstance(node, list):
                waiting.extend((child, root) for child in node)
                continue
            if not isinstance(node, dict):
                continue
            for name, limit in (("enum", 0), ("type", _MAX_TYPES)):
                listed = node.get(name)
                values += len(listed) if isinstance(listed, list) and len(listed) > limit else 0
            properties, required = node.get("properties"), node.get("required")
            if isinstance(properties, dict):
                names = required if isinstance(required, list) else []
                squares += len(properties.keys() - {name for name in names if isinstance(name, str)}) ** 2
                is_open = node.get("additionalProperties", False) is not False
                if is_open and sum(map(len, properties)) > _MAX_NAME_CHARACTERS:
                    raise TooWide(
                        "an object with additionalProperties has names of more than "
                        f"{_MAX_NAME_CHARACTERS} characters"
                    )
            ranges += any(_is_number(node.get(name)) for name in _BOUNDS)
            _check_spans(node)
            lengths = [node.get(name) for name in _LENGTHS]
            repeats += sum(
                length for length in lengths if isinstance(length, int) and 0 < length <= _MAX_REPEATS
            )
            pattern = node.get("pattern")
            if isinstance(pattern, str):
                letters += len(pattern) // _FORMAT_DIVISOR if pattern in _FORMAT_PATTERNS else len(pattern)
                if letters > _MAX_PATTERN_CHARACTERS:
                    raise TooWide(f"its patterns have more than {_MAX_PATTERN_CHARACTERS} characters")
                try:
                    check_pattern(pattern)
                except TooManyWays as error:
                    raise TooWide(f"the pattern {pattern[:80]!r}: {error}") from None
            if "$ref" in node or "allOf" in node:
                _check_references(node, root, followed)
            if any(isinstance(node.get(name), list) for name in _CHOICES):
                _Choices(root).ways(node)
            for name, child in node.items():
                if isinstance(child, dict | list):
                    waiting.append((child, child if name in _ROOTS else root))
        if values > _MAX_VALUES:
            raise TooWide(f"its enumerations have more than {_MAX_VALUES} values")
        if ranges > _MAX_RANGES:
            raise TooWide(f"it bounds more than {_MAX_RANGES} numbers")
        if repeats > _MAX_REPEATS:
            raise TooWide(f"its bounds of lengths add up to more than {_MAX_REPEATS}")
        if squares > _MAX_OPTIONAL_SQUARED:
            raise TooWide("it has too many optional properties; make more of them required")
        self._totals = (values, squares, letters, ranges, repeats)


def _check_references(
    schema: object, root: object, followed: dict[tuple[int, str], bool], depth: int = 0
) -> None:
    """Reject a reference that leads to itself through others and ``allOf``: an engine crashes following it.

    ``followed``: references seen so far → whether they have been followed to the end.
    """
    if depth > _MAX_DEPTH:
        raise TooWide("its references are nested too deeply")
    if not isinstance(schema, dict):
        return
    reference = schema.get("$ref")
    if isinstance(reference, str):
        key = (id(root), reference)
        if followed.get(key) is False:
            raise TooWide(f"the reference {reference[:80]!r} leads to itself")
        if key not in followed:
            followed[key] = False
            _check_references(_resolve(root, reference), root, followed, depth + 1)
            followed[key] = True
    members = schema.get("allOf")
    for member in members if isinstance(members, list) else ():
        _check_references(member, root, followed, depth + 1)


def _check_spans(schema: dict[str, Any]) -> None:
    """Reject bounds that become a repetition with its minimum above its maximum: an engine creates rules from
    it until its memory is exhausted.
    """
    for low_name, high_name in _SPANS:
        low, high = schema.get(low_name), schema.get(high_name)
        for name, count in ((low_name, low), (high_name, high)):
            if _is_number(count) and count > _MAX_LENGTH:
                raise TooWide(f"{name} is more than {_MAX_LENGTH}")
        if _is_number(low) and _is_number(high) and low > high:
            raise TooWide(f"{low_name} is more than {high_name}")
    kinds = schema.get("type")
    if kinds == "integer" or (isinstance(kinds, list) and "integer" in kinds):
        lows, highs = (
            [value for name in names if _is_number(value := schema.get(name))]
            for names in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum"))
        )
        if (lows and not highs and max(lows) >= _MAX_BOUND) or (
            highs and not lows and min(highs) <= -_MAX_BOUND
        ):
            raise TooWide(f"the only bound of an integer is beyond {_MAX_BOUND}")


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


class _Choices:
    """Counts alternatives, also through references, each of which may lead to further choices."""

    def __init__(self, root: object) -> None:
        self._root = root
        self._known: dict[str, int] = {}
        self._steps = 0

    def ways(self, schema: object, depth: int = 0) -> int:
        """Return the number of alternatives.

        Raises:
            TooWide: there are too many.
        """
        self._steps += 1
        if depth > _MAX_DEPTH or self._steps > _MAX_STEPS:
            raise TooWide("its choices refer to one another too deeply")
        if not isinstance(schema, dict):
            return 1
        count = 0
        reference = schema.get("$ref")
        if isinstance(reference, str):
            if reference not in self._known:
                self._known[reference] = 0  # within itself
                self._known[reference] = self.ways(_resolve(self._root, reference), depth + 1)
            count = self._known[reference]
        for name in _CHOICES:
            choices = schema.get(name)
            if isinstance(choices, list):
                count += sum(self.ways(choice, depth + 1) for choice in choices)
        listed = schema.get("enum")
        count += len(listed) if isinstance(listed, list) else 0
        if count > MOST_WAYS:
            raise TooWide(f"it offers more than {MOST_WAYS} choices at one place")
        return max(1, count)


def _resolve(root: object, reference: str) -> object:
    """Return what an engine takes the reference for: llama.cpp reads an index as ``std::stoul`` does."""
    node: Any = root
    for part in reference.removeprefix("#").split("/")[1:]:
        if isinstance(node, list) and (match := _INDEX.match(part)):
            index = int(match[1][:10])  # of a longer number the beginning is beyond any list
            node = node[index] if index < len(node) else None
        else:
            node = node.get(part) if isinstance(node, dict) else None
    return node
