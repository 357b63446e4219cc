"""Converts numbers and strings of a JSON schema to the keywords that llama.cpp reads. Pure."""

from __future__ import annotations

import math
from fractions import Fraction

from sollold.api.grammar.formats import FORMATS
from sollold.api.grammar.join import Unsatisfiable
from sollold.api.grammar.keywords import BOUNDS, exact, kinds_of, type_of
from sollold.api.grammar.pattern_length import with_length
from sollold.api.grammar.settled import Settled

_MAX_VALUES = 256
"""Maximum numbers that are listed individually."""
_MAX_BOUND = 10**15
"""llama.cpp reads a single bound up to this, and two bounds up to `_MAX_OF_TWO`."""
_MAX_OF_TWO = 10**18


def settle_number(settled: Settled) -> None:
    """Convert bounds of integers, and multiples, which are listed if they have bounds.

    Raises:
        Unsatisfiable: no number is within the bounds.
    """
    kinds = kinds_of(settled.schema) or []
    step = settled.schema.get("multipleOf")
    if step and step > 0 and step == int(step) and "number" in kinds:
        settled.set(
            type=type_of(list(dict.fromkeys("integer" if kind == "number" else kind for kind in kinds)))
        )
        kinds = kinds_of(settled.schema) or []
    if step and step == 1 and "number" not in kinds and kinds:
        settled.set(multipleOf=None)
        step = None
    if step and step > 0 and {"integer", "number"} & {*kinds} and _list_multiples(settled, step, kinds):
        return
    if "integer" in kinds and "number" not in kinds:
        _bound_integer(settled)


def _range(settled: Settled) -> tuple[Fraction | None, bool, Fraction | None, bool]:
    """Return the lower bound and whether it is inclusive, then the same for the upper one."""
    schema = settled.schema
    low, exclusive_low = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, exclusive_high = schema.get("maximum"), schema.get("exclusiveMaximum")
    with_low = exclusive_low is None or (low is not None and low > exclusive_low)
    with_high = exclusive_high is None or (high is not None and high < exclusive_high)
    lower, upper = (low if with_low else exclusive_low), (high if with_high else exclusive_high)
    return (
        None if lower is None else exact(lower),
        with_low,
        None if upper is None else exact(upper),
        with_high,
    )


def _list_multiples(settled: Settled, step: float, kinds: list[str]) -> bool:
    """List the multiples between two bounds, if there are few; return whether that was done."""
    low, with_low, high, with_high = _range(settled)
    if low is None or high is None:
        return False
    size = exact(step)
    first, last = math.ceil(low / size), math.floor(high / size)
    first += not with_low and first * size == low
    last -= not with_high and last * size == high
    if last - first >= _MAX_VALUES:
        return False
    only_integers = "number" not in kinds
    values = [n * size for n in range(first, last + 1) if not only_integers or (n * size).denominator == 1]
    other_kinds = [kind for kind in kinds if kind not in ("integer", "number")]
    if not values and not other_kinds:
        raise Unsatisfiable("multipleOf", "no multiple is within the bounds")
    settled.set(**dict.fromkeys((*BOUNDS, "multipleOf", "type")))
    listed = {"enum": [int(value) if value.denominator == 1 else float(value) for value in values]}
    if other_kinds:
        further = {"type": type_of(other_kinds)}
        settled.alternatives = [further, listed] if values else [further]
    else:
        settled.set(**listed)
    return True


def _bound_integer(settled: Settled) -> None:
    schema = settled.schema
    low, with_low, high, with_high = _range(settled)
    lowest = None if low is None else math.ceil(low) if with_low else math.floor(low) + 1
    highest = None if high is None else math.floor(high) if with_high else math.ceil(high) - 1
    if lowest is not None and highest is not None and lowest > highest:
        raise Unsatisfiable("minimum", "no integer is within the bounds")
    if len(schema.keys() & {*BOUNDS}) == (lowest is not None) + (highest is not None) and all(
        abs(schema[key]) < _MAX_BOUND for key in BOUNDS if key in schema
    ):
        return  # llama.cpp reads them as they are
    if (lowest or 0) > _MAX_OF_TWO or (highest or 0) < -_MAX_OF_TWO:
        settled.problems.append(("minimum" if lowest else "maximum", "it is too large"))
        settled.set(**dict.fromkeys(BOUNDS))
        return
    # llama.cpp generates no integers with that many digits.
    lowest = None if lowest is not None and lowest < -_MAX_OF_TWO else lowest
    highest = None if highest is not None and highest > _MAX_OF_TWO else highest
    if lowest is not None and lowest >= _MAX_BOUND and highest is None:
        highest = _MAX_OF_TWO
    if highest is not None and highest <= -_MAX_BOUND and lowest is None:
        lowest = -_MAX_OF_TWO
    settled.set(minimum=lowest, maximum=highest, exclusiveMinimum=None, exclusiveMaximum=None)


def settle_text(settled: Settled, *, formats: bool = True) -> None:
    """Convert formats to patterns, and restrict patterns to the lengths beside them; these keywords stay.

    Raises:
        Unsatisfiable: no length is allowed.
    """
    schema = settled.schema
    if schema.get("minLength", 0) > schema.get("maxLength", math.inf):
        raise Unsatisfiable("minLength", "it is more than maxLength")
    pattern = schema.get("pattern")
    form = schema.get("format") if formats else None
    if pattern is None and isinstance(form, str) and form in FORMATS:
        pattern = FORMATS[form]
        settled.set(pattern=pattern)
    if pattern is not None and ("minLength" in schema or "maxLength" in schema):
        bounded = with_length(pattern, schema.get("minLength", 0), schema.get("maxLength", math.inf))
        if bounded is not None:
            settled.set(pattern=bounded)
