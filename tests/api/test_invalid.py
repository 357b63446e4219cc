"""Errors about invalid fields name the field and its valid values."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

import msgspec
import pytest

from sollold.api.http.body import as_type
from sollold.errors import Refusal


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


class Inner(msgspec.Struct):
    size: int = 0


class Body(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    kv: Literal["f16", "q8_0"] | Literal[""] = ""
    colour: Colour | None = None
    count: Annotated[int, msgspec.Meta(ge=1)] = 1
    size: Annotated[int, msgspec.Meta(le=64)] = 1
    share: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    inner: Inner | None = None


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"name": "a", "kv": "q3"}, "invalid request: kv: 'q3' is not one of f16, q8_0"),
        ({"name": "a", "colour": "green"}, "invalid request: colour: 'green' is not one of red, blue"),
        ({"name": "a", "count": 0}, "invalid request: count: must be at least 1"),
        ({"name": "a", "size": 65}, "invalid request: size: must be at most 64"),
        ({"name": "a", "share": 0.0}, "invalid request: share: must be more than 0.0"),
        ({"name": "a", "inner": {"size": []}}, "invalid request: inner.size: expected int, got array"),
        ({"name": "a", "color": "red"}, "invalid request: unknown field color; did you mean colour?"),
        ({"name": "a", "x": 1}, "invalid request: unknown field x"),
        ({}, "invalid request: object missing required field name"),
    ],
)
def test_the_error_names_the_field_and_its_valid_values(body: dict[str, Any], expected: str) -> None:
    with pytest.raises(Refusal) as caught:
        as_type(body, Body)
    assert caught.value.message == expected
