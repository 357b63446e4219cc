"""Converts ``uniqueItems`` and ``contains``, which a JSON schema requires of all items together. Pure.

llama.cpp reads neither. If there are few such arrays, or few lengths, each becomes an alternative.
"""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import msgspec

from sollold.api.grammar.join import Unsatisfiable, all_of, tuple_of
from sollold.api.grammar.keywords import JOINS, constraints_of, is_among, kind_of_value, kinds_of, values_of
from sollold.api.grammar.settled import Settled
from sollold.api.grammar.values import Resolve, ValueCheck

_MOST_ARRAYS = 256
_FEW_ARRAYS = 16
_LONGEST = 8000
"""Maximum length of all listed arrays as JSON, in bytes."""
_MOST_ITEMS = 4
_OF_ARRAYS = (
    *("items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems"),
    *("contains", "minContains", "maxContains"),
)


def settle_items(settled: Settled, resolve: Resolve, check: ValueCheck, *, many: bool) -> None:
    """Convert ``uniqueItems`` of listed values, and ``contains`` of short arrays.

    ``many``: also if ``uniqueItems`` takes many alternatives.

    Raises:
        Unsatisfiable: no array satisfies the schema.
    """
    if settled.schema.get("uniqueItems") is True:
        _list_arrays(settled, resolve, check, _MOST_ARRAYS if many else _FEW_ARRAYS)
    if "contains" in settled.schema:
        _place_contained(settled)


def _list_arrays(settled: Settled, resolve: Resolve, check: ValueCheck, allowed: int) -> None:
    schema = settled.schema
    values = _distinct(schema.get("items"), resolve)
    if values is None or tuple_of(schema)[0] or settled.alternatives is not None:
        return
    least, most = schema.get("minItems", 0), int(min(schema.get("maxItems", math.inf), len(values)))
    if least > most:
        raise Unsatisfiable("uniqueItems", f"there are only {len(values)} different items")
    counts = {count: math.perm(len(values), count) for count in range(least, most + 1)}
    if sum(counts.values()) > allowed or not check.spend(sum(n * found for n, found in counts.items())):
        return
    arrays = [list(one) for count in range(least, most + 1) for one in permutations(values, count)]
    if len(msgspec.json.encode(arrays)) > _LONGEST:
        return
    if "contains" in schema:
        wanted = {key: schema[key] for key in ("contains", "minContains", "maxContains") if key in schema}
        verdicts = [check.admits(wanted, one) for one in arrays]
        if None in verdicts:
            return
        arrays = [one for one, verdict in zip(arrays, verdicts, strict=True) if verdict]
        if not arrays:
            raise Unsatisfiable("contains", "no array of different items has such an item")
    others = [kind for kind in kinds_of(schema) or () if kind != "array"]
    settled.set(**dict.fromkeys((*_OF_ARRAYS, "type")))
    if others:
        settled.alternatives = [{"type": others[0] if len(others) == 1 else others}, {"enum": arrays}]
    else:
        settled.set(enum=arrays)


def _distinct(items: Any, resolve: Resolve) -> list[Any] | None:
    """Return the different values that items may have; None if they are not listed."""
    if isinstance(items, dict) and "$ref" in items and not constraints_of(items):
        items = resolve(items["$ref"])
    if not isinstance(items, dict) or items.keys() & JOINS:
        return None
    if constraints_of(items).keys() - {"enum", "const", "type"}:
        return None
    values, kinds = values_of(items), kinds_of(items)
    if values is None or len(values) > _MOST_ARRAYS:
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
    wanted, fewest = schema["contains"], schema.get("minContains", 1)
    if fewest == 0 and "maxContains" not in schema:
        settled.set(contains=None, minContains=None)
        return
    least, most = max(1, schema.get("minItems", 0)), schema.get("maxItems", math.inf)
    if not isinstance(wanted, dict) or fewest != 1 or "maxContains" in schema:
        return
    if most > _MOST_ITEMS or settled.alternatives is not None:
        return
    if least > most:
        raise Unsatisfiable("contains", "there are no items")
    prefix, rest = tuple_of(schema)
    if rest is False:
        most = min(most, len(prefix))
    further = rest if isinstance(rest, dict) else {}
    choices: list[dict[str, Any]] = []
    for count in range(least, int(most) + 1):
        items = [*prefix[:count], *[further] * (count - len(prefix))]
        for place in range(count):
            placed = [all_of(one, wanted) if at == place else one for at, one in enumerate(items)]
            choices.append({"prefixItems": placed})
    if not choices:
        raise Unsatisfiable("contains", "there are too few items")
    settled.set(**dict.fromkeys(("items", "prefixItems", "additionalItems", "contains", "minContains")))
    if len(choices) == 1:
        settled.set(**choices[0])
    else:
        settled.alternatives = choices
