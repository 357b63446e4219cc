"""Arrays of a JSON schema in the keywords that llama.cpp reads. Pure."""

from __future__ import annotations

import math
from typing import Any

from sollold.api.grammar.join import Impossible, tuple_of
from sollold.api.grammar.settle_items import settle_items
from sollold.api.grammar.settled import Settled
from sollold.api.grammar.values import Resolve, ValueCheck

_MOST_FURTHER = 16
"""Items behind those that each have a schema of their own: llama.cpp writes arrays of one length alone, and
each length is a choice.
"""
_LONGEST = 64


def settle_array(settled: Settled, resolve: Resolve, check: ValueCheck, *, many: bool) -> None:
    """Lengths, items that have a schema each, and what is demanded of them together.

    ``many``: also where that takes many choices.

    Raises:
        Impossible: the lengths leave nothing.
    """
    schema = settled.schema
    least, most = schema.get("minItems", 0), schema.get("maxItems", math.inf)
    if least > most:
        raise Impossible("minItems", "it is more than maxItems")
    if schema.get("uniqueItems") is False or (most <= 1 and "uniqueItems" in schema):
        settled.set(uniqueItems=None)
    settle_items(settled, resolve, check, many=many)
    if settled.alternatives is not None or "enum" in settled.schema:
        return
    prefix, rest = tuple_of(settled.schema)
    if not prefix:
        if settled.schema.get("items") is False:
            settled.set(items=None, maxItems=0)
        return
    _settle_tuple(settled, prefix, rest, least, most)


def _settle_tuple(settled: Settled, prefix: list[Any], rest: Any, least: int, most: float) -> None:
    count = len(prefix)
    first = last = max(least, count)
    if rest is False and least > count:
        raise Impossible("minItems", "there are fewer items")
    if first > _LONGEST:
        settled.notes.append(("minItems", f"above {_LONGEST} beside prefixItems"))
        first = last = count
    if rest and isinstance(rest, dict) and most > first and first <= _LONGEST:
        first = least
        last = int(min(most, max(least, count) + _MOST_FURTHER))
        if last < most:
            settled.notes.append(("items", f"at most {last} items are written"))
    first, last = int(min(first, most)), int(min(last, most))
    if first == last == count:
        # As llama.cpp reads it: of one length.
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
        settled.alternatives = [{"prefixItems": one} if one else {"maxItems": 0} for one in tuples]
