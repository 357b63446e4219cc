"""Converts ``not`` for integers and strings, if the rest has a form that llama.cpp reads. Pure."""

from __future__ import annotations

import math
from typing import Any

from sollold.api.grammar.join import Unsatisfiable
from sollold.api.grammar.keywords import (
    BOUNDS,
    JOINS,
    constraints_of,
    exact,
    kind_of_value,
    kinds_of,
    values_of,
)
from sollold.api.grammar.settled import Settled

_MAX_VALUES = 8
_OPPOSITE = {
    "minimum": "exclusiveMaximum",
    "exclusiveMinimum": "maximum",
    "maximum": "exclusiveMinimum",
    "exclusiveMaximum": "minimum",
}


def settle_denied(settled: Settled) -> None:
    """Convert denied values and bounds to bounds of the remaining values.

    Raises:
        Unsatisfiable: none remain.
    """
    denied, kinds = settled.schema.get("not"), kinds_of(settled.schema)
    if not isinstance(denied, dict) or denied.keys() & JOINS or settled.alternatives is not None:
        return
    if kinds is None or len(kinds) != 1 or kinds[0] not in (kinds_of(denied) or kinds):
        return
    demands = {key: value for key, value in constraints_of(denied).items() if key != "type"}
    if kinds == ["integer"] and len(demands) == 1:
        _deny_integers(settled, denied, demands)
    if kinds == ["string"] and len(demands) == 1:
        _deny_texts(settled, denied, demands)


def _deny_integers(settled: Settled, denied: dict[str, Any], demands: dict[str, Any]) -> None:
    ((keyword, value),) = demands.items()
    if keyword in BOUNDS:
        _tighten(settled, _OPPOSITE[keyword], value)
        settled.set(**{"not": None})
        return
    values = values_of(denied) if keyword in ("const", "enum") else None
    if values is None:
        return
    excluded = sorted({int(value) for value in values if kind_of_value(value) == "integer"})
    if len(excluded) > _MAX_VALUES:
        return
    low, high = _integer_range(settled.schema)
    ranges: list[dict[str, Any]] = []
    for integer in (*(integer for integer in excluded if low <= integer <= high), None):
        last = high if integer is None else integer - 1
        if low <= last:
            bounds = {"minimum": low, "maximum": last}
            ranges.append({key: int(bound) for key, bound in bounds.items() if abs(bound) != math.inf})
        low = math.inf if integer is None else integer + 1
    if not ranges:
        raise Unsatisfiable("not", "it excludes all allowed integers")
    settled.set(**{"not": None}, **dict.fromkeys(BOUNDS))
    if len(ranges) == 1:
        settled.set(**ranges[0])
    else:
        settled.alternatives = ranges


def _integer_range(schema: dict[str, Any]) -> tuple[float, float]:
    """Return the smallest and the largest integer that the bounds allow."""
    low, high = -math.inf, math.inf
    for key, value in schema.items():
        if key == "minimum":
            low = max(low, math.ceil(exact(value)))
        elif key == "exclusiveMinimum":
            low = max(low, math.floor(exact(value)) + 1)
        elif key == "maximum":
            high = min(high, math.floor(exact(value)))
        elif key == "exclusiveMaximum":
            high = min(high, math.ceil(exact(value)) - 1)
    return low, high


def _deny_texts(settled: Settled, denied: dict[str, Any], demands: dict[str, Any]) -> None:
    ((keyword, value),) = demands.items()
    if keyword == "maxLength":
        _tighten(settled, "minLength", value + 1)
    elif keyword == "minLength" and value > 0:
        _tighten(settled, "maxLength", value - 1)
    elif keyword in ("const", "enum") and values_of(denied) == [""]:
        _tighten(settled, "minLength", 1)
    else:
        return
    settled.set(**{"not": None})


def _tighten(settled: Settled, keyword: str, value: float) -> None:
    """Set a bound, or keep the present one if that is tighter."""
    tighter = max if keyword in ("minLength", "minimum", "exclusiveMinimum") else min
    settled.set(**{keyword: tighter(value, settled.schema.get(keyword, value))})
