"""Converts ``uniqueItems`` and ``contains``, which a JSON schema requires of all items together. Pure.

llama.cpp reads neither. If there are few such arrays, or few lengths, each becomes an alternative.
"""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import msgspec

from sollold.api.grammar.join import Unsatisfiable, all_of, tuple_of
from sollold.api.grammar.keywords import (
    JOINS,
    constraints_of,
    is_among,
    kind_of_value,
    kinds_of,
    type_of,
    values_of,
)
from sollold.api.grammar.settled import Settled
from sollold.api.grammar.values import Resolve, ValueCheck

_MAX_ARRAYS = 256
_MAX_FEW_ARRAYS = 16
_MAX_BYTES = 8000
"""Maximum length of all listed arrays as JSON, in bytes."""
_MAX_ITEMS = 4
_ARRAY_KEYWORDS = (
    *("items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems"),
    *("contains", "minContains", "maxContains"),
)


def settle_items(settled: Settled, check: ValueCheck, *, many: bool) -> None:
    """Convert ``uniqueItems`` of listed values, and ``contains`` of short arrays.

    ``many``: also if ``uniqueItems`` takes many alternatives.

    Raises:
        Unsatisfiable: no array satisfies the schema.
    """
    if settled.schema.get("uniqueItems") is True:
        _list_arrays(settled, check, _MAX_ARRAYS if many else _MAX_FEW_ARRAYS)
    if "contains" in settled.schema:
        _place_contained(settled)


def _list_arrays(settled: Settled, check: ValueCheck, limit: int) -> None:
    schema = settled.schema
    values = _item_values(schema.get("items"), check.resolve)
    if values is None or tuple_of(schema)[0] or settled.alternatives is not None:
        return
    low, high = schema.get("minItems", 0), int(min(schema.get("maxItems", math.inf), len(values)))
    if low > high:
        raise Unsatisfiable("uniqueItems", f"there are only {len(values)} different items")
    counts = {count: math.perm(len(values), count) for count in range(low, high + 1)}
    if sum(counts.values()) > limit or not check.spend(sum(n * k for n, k in counts.items())):
        return
    arrays = [list(items) for count in range(low, high + 1) for items in permutations(values, count)]
    if len(msgspec.json.encode(arrays)) > _MAX_BYTES:
        return
    if "contains" in schema:
        contains = {key: schema[key] for key in ("contains", "minContains", "maxContains") if key in schema}
        verdicts = [check.admits(contains, array) for array in arrays]
        if None in verdicts:
            return
        arrays = [array for array, verdict in zip(arrays, verdicts, strict=True) if verdict]
        if not arrays:
            raise Unsatisfiable("contains", "no array of different items has such an item")
    kinds = [kind for kind in kinds_of(schema) or () if kind != "array"]
    settled.set(**dict.fromkeys((*_ARRAY_KEYWORDS, "type")))
    if kinds:
        settled.alternatives = [{"type": type_of(kinds)}, {"enum": arrays}]
    else:
        settled.set(enum=arrays)


def _item_values(items: Any, resolve: Resolve) -> list[Any] | None:
    """Return the different values that items may have; None if they are not listed."""
    if isinstance(items, dict) and "$ref" in items and not constraints_of(items):
        items = resolve(items["$ref"])
    if not isinstance(items, dict) or items.keys() & JOINS:
        return None
    if constraints_of(items).keys() - {"enum", "const", "type"}:
        return None
    values, kinds = values_of(items), kinds_of(items)
    if values is None or len(values) > _MAX_ARRAYS:
        return None
    found: list[Any] = []
    for value in values:
        kind = kind_of_value(value)
        fits = kinds is None or kind in kinds or (kind == "integer" and "number" in kinds)
        if fits and not is_among(value, found):
            found.append(value)
    return found


def _place_contained(settled: Settled) -> None:
    """Convert ``contains`` to a choice of the position of the required item."""
    schema = settled.schema
    contained, minimum = schema["contains"], schema.get("minContains", 1)
    if minimum == 0 and "maxContains" not in schema:
        settled.set(contains=None, minContains=None)
        return
    low, high = max(1, schema.get("minItems", 0)), schema.get("maxItems", math.inf)
    if not isinstance(contained, dict) or minimum != 1 or "maxContains" in schema:
        return
    if high > _MAX_ITEMS or settled.alternatives is not None:
        return
    if low > high:
        raise Unsatisfiable("contains", "there are no items")
    prefix, rest = tuple_of(schema)
    if rest is False:
        high = min(high, len(prefix))
    further = rest if isinstance(rest, dict) else {}
    choices: list[dict[str, Any]] = []
    for count in range(low, int(high) + 1):
        items = [*prefix[:count], *[further] * (count - len(prefix))]
        for index in range(count):
            placed = [all_of(item, contained) if n == index else item for n, item in enumerate(items)]
            choices.append({"prefixItems": placed})
    if not choices:
        raise Unsatisfiable("contains", "there are too few items")
    settled.set(**dict.fromkeys(("items", "prefixItems", "additionalItems", "contains", "minContains")))
    if len(choices) == 1:
        settled.set(**choices[0])
    else:
        settled.alternatives = choices
