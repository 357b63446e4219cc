"""Texts that a converted pattern matches: the same as with `re`, in bounded time."""

from __future__ import annotations

import random
import re
import time
from typing import Any

import pytest

from sollold.api.grammar.formats import FORMATS, NATIVE, has_format, implies_format
from sollold.api.grammar.pattern import convertible_pattern
from sollold.api.grammar.pattern_match import matches, samples
from sollold.api.grammar.problem import SchemaProblem
from sollold.api.grammar.schema import convert_schema
from sollold.api.grammar.unenforced import unenforced


def rewritten(schema: dict[str, Any]) -> tuple[dict[str, Any], list[SchemaProblem]]:
    """(Schema for llama.cpp, constraints that it does not enforce)."""
    converted = convert_schema(schema)
    return converted.schema, [*converted.problems, *converted.notes, *unenforced(converted.schema)]


PATTERNS = [
    r"^$",
    r"^a*b+c?$",
    r"^(ab|a)(c|bcd)(d*)$",
    r"^([a-z]{2,3}-?)*$",
    r"^(a|b){0,3}(|x)$",
    r"^((a{2}){2,}|[^a-c])$",
    r"^\d+(\.\d{1,2})?$",
    r"^(x*)*y$",
    r"^([A-Z]\.)+$|^none$",
    r"a.c",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_converted_patterns_match_as_in_re(pattern: str) -> None:
    converted, chance = convertible_pattern(pattern), random.Random(pattern)
    texts = ["".join(chance.choices("abcdxyAB.-019", k=chance.randrange(9))) for _ in range(400)]
    texts += samples(converted, 50)
    for text in texts:
        assert matches(converted, text) is bool(re.search(pattern, text)), text
    assert all(matches(converted, text) for text in samples(converted, 50))


@pytest.mark.parametrize(
    "pattern", ["^(a|a)*b$", "^((a*)*)*b$", "^(a{1,1000}){1000}b$", "^(((a?){99}){99}){99}$"]
)
def test_matching_takes_bounded_time(pattern: str) -> None:
    began = time.thread_time()
    assert matches(convertible_pattern(pattern), "a" * 999) in (False, None, True)
    samples(convertible_pattern(pattern), 5)
    assert time.thread_time() - began < 0.5


def test_texts_and_patterns_of_formats_are_recognized() -> None:
    for name, text in {
        "date": "2024-02-29",
        "time": "10:00:00Z",
        "date-time": "2024-02-29T10:00:00.5+01:00",
        "uuid": "0" * 8 + "-0000" * 3 + "-" + "a" * 12,
        "email": "a.b@c.d",
        "ipv4": "1.2.3.4",
    }.items():
        assert has_format(text, name) and has_format("§", name) is None
    assert has_format("anything", "color") and has_format("a", "regex") is None
    for name, pattern in FORMATS.items():
        assert implies_format(pattern, name), name
        assert not implies_format("^x+§$", name)
    assert not any(implies_format("^[a-z]+ $", name) for name in NATIVE)


ZOD_DATE = (
    r"((\d\d[2468][048]|\d\d[13579][26]|\d\d0[48]|[02468][048]00|[13579][26]00)-02-29|\d{4}-((0[13578]|1[02])"
    r"-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)|(02)-(0[1-9]|1\d|2[0-8])))"
)
ZOD = {
    "date": f"^{ZOD_DATE}$",
    "date-time": rf"^{ZOD_DATE}T(?:(?:[01]\d|2[0-3]):[0-5]\d(?::[0-5]\d(?:\.\d+)?)?(?:Z))$",
    "uuid": "^([0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[1-8][0-9a-fA-F]{3}-[89abAB][0-9a-fA-F]{3}-[0-9a-fA-F]{12})$",
    "ipv4": r"^(?:(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9][0-9]|[0-9])\.){3}(?:25[0-5]|[1-9][0-9]|[0-9])$",
    "email": (
        r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"
    ),
}


@pytest.mark.parametrize("form", ZOD)
def test_a_format_implied_by_the_pattern_is_no_problem(form: str) -> None:
    """Zod writes both ``format`` and ``pattern``."""
    schema, left = rewritten({"type": "string", "format": form, "pattern": ZOD[form]})
    assert not left and schema["pattern"].startswith("^")
    _, left = rewritten({"type": "string", "format": form, "pattern": "^[a-z]+$"})
    assert [problem.keyword for problem in left] == ["format"]


def test_zods_email_pattern_is_converted_without_lookarounds() -> None:
    converted, chance = convertible_pattern(ZOD["email"]), random.Random(1)
    texts = ["a@b.cd", "a..b@c.de", ".a@c.de", "a.@c.de", "a.b@c-.de", "a@b", "a@b..cd", "a'@b.cd", "@b.cd"]
    texts += ["".join(chance.choices("aB0_'+-.@", k=6)) + "@b.cd" for _ in range(2000)]
    for text in texts:
        assert matches(converted, text) is bool(re.search(ZOD["email"], text)), text


def test_many_patterns_are_checked_in_bounded_time() -> None:
    forms = {
        f"p{n}": {"type": "string", "format": "date", "pattern": f"^[0-9]{{4}}-{n}$"} for n in range(2000)
    }
    began = time.thread_time()
    _, left = rewritten({"type": "object", "properties": forms})
    assert len(left) == 2000 and time.thread_time() - began < 1.5


@pytest.mark.parametrize(
    ("constraints", "expected"),
    [
        ({"pattern": "^[a-z][0-9]$"}, ["a1"]),
        ({"pattern": "^(b|2020).*$"}, ["b", "2020-01-01"]),
        ({"not": {"pattern": "^b"}}, ["a1", "2020-01-01", 'q"', "é\n"]),
        ({"pattern": "."}, None),
    ],
)
def test_enum_values_are_filtered_by_the_pattern(
    constraints: dict[str, object], expected: list[str] | None
) -> None:
    values = ["a1", "b", "2020-01-01", 'q"', "é\n"]
    schema, left = rewritten({"type": "string", "enum": values, **constraints})
    certain = [value for value in schema["enum"] if value not in ('q"', "é\n")]
    if expected is None:
        assert schema["enum"] == values
    else:
        assert certain == [value for value in expected if value not in ('q"', "é\n")]
        # A converted pattern doesn't cover characters that JSON escapes.
        assert {'q"', "é\n"} <= {*schema["enum"]} and left
    schema, left = rewritten({"enum": ["2020-01-01"], "format": "date"})
    assert schema["enum"] == ["2020-01-01"] and not left
