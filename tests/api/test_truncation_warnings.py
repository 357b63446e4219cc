"""Warnings about truncated prompts."""

from __future__ import annotations

from typing import Any

import pytest

from sollold.api.engine.truncate import TruncatingService
from sollold.serving.request import Ask, Call, Engine
from tests.api.api_parts import ScriptedService

OLD, LAST = {"role": "user", "content": "old"}, {"role": "user", "content": "a b c"}


def ask(path: str, body: dict[str, Any]) -> Ask:
    return Ask("r", "demo", {Engine.LLAMA: Call(path, body)}, True)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({"messages": [OLD, OLD, LAST]}, {"messages": [LAST]}, "2 of the older messages were omitted"),
        ({"messages": [LAST]}, {"messages": [{**LAST, "content": "c"}]}, "beginning of the last message"),
        ({"prompt": "a b c"}, {"prompt": [3]}, "its beginning was omitted"),
        ({"input": ["a b c"]}, {"input": [[1]]}, "the end of each text"),
    ],
)
def test_the_warning_names_the_part_that_was_removed(
    before: dict[str, Any], after: dict[str, Any], expected: str
) -> None:
    service = TruncatingService(ScriptedService())
    (warning,) = service._warnings(ask("/x", before), ask("/x", after))
    assert "longer than the context" in warning and expected in warning
    first = ask("/x", before)
    assert service._warnings(first, first) == ()
