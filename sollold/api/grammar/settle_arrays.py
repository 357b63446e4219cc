"""Converts arrays of a JSON schema to the keywords that llama.cpp reads. Pure."""

from __future__ import annotations

import math
from typing import Any

from sollold.api.grammar.join import Unsatisfiable, tuple_of
from sollold.api.grammar.settle_items import settle_items
from sollold.api.grammar.settled import Settled
from sollold.api.grammar.values import ValueCheck

_MAX_FURTHER = 16
"""Maximum items after those that have a schema of their own: llama.cpp generates such arrays only with a
fixed length, so each length becomes an alternative.
"""
_MAX_ITEMS = 64


def settle_array(settled: Settled, check: ValueCheck, *, many: bool) -> None:
    """Convert lengths, tuples, and constraints on all items together.

    ``many``: also if that takes many alternatives.

    Raises:
        Unsatisfiable: no array satisfies the schema.
    """
    schema = settled.schema
    low, high = schema.get("minItems", 0), schema.get("maxItems", math.inf)
    if low > high:
        raise Unsatisfiable("minItems", "it is more than maxItems")
    if schema.get("uniqueItems") is False or (high <= 1 and "uniqueItems" in schema):
        settled.set(uniqueItems=None)
    settle_items(settled, check, many=many)
    if settled.alternatives is not None or "enum" in settled.schema:
        return
    prefix, rest = tuple_of(settled.schema)
    if not prefix:
        if settled.schema.get("items") is False:
            settled.set(items=None, maxItems=0)
        return
    _settle_tuple(settled, prefix, rest, low, high)


def _settle_tuple(settled: Settled, prefix: list[Any], rest: Any, low: int, high: float) -> None:
    count = len(prefix)
    first = last = max(low, count)
    if rest is False and low > count:
        raise Unsatisfiable("minItems", "fewer items are allowed")
    if first > _MAX_ITEMS:
        settled.notes.append(("minItems", f"above {_MAX_ITEMS} beside prefixItems"))
        first = last = count
    if rest and isinstance(rest, dict) and high > first and first <= _MAX_ITEMS:
        first = low
        last = int(min(high, max(low, count) + _MAX_FURTHER))
        if last < high:
            settled.notes.append(("items", f"at most {last} items are generated"))
    first, last = int(min(first, high)), int(min(last, high))
    if first == last == count:
        # A tuple of one length, as llama.cpp reads it.
        settled.set(additionalItems=None)
        if not isinstance(settled.schema.get("items"), list):
            settled.set(items=None)
        return
    further = [rest if isinstance(rest, dict) else {}]
    tuples = [(prefix + further * (length - count))[:length] for length in range(first, last + 1)]
    settled.set(**dict.fromkeys(("items", "prefixItems", "additionalItems")))
    if len(tuples) == 1 or settled.alternatives is not None:
        settled.set(**({"prefixItems": tuples[0]} if tuples[0] else {"maxItems": 0}))
    else:
        settled.alternatives = [{"prefixItems": items} if items else {"maxItems": 0} for items in tuples]
