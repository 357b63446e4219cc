"""An Ollama that cuts a prompt does not say so; its counts tell."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sollold.cluster.gossip.record import Backend
from sollold.serving.prompt_cut import CutPrompt, prompt_size, tokens_read, was_cut
from sollold.serving.request import Engine, Routing


@pytest.mark.parametrize(
    ("size", "read", "context", "cut"),
    [
        (24_000, 2046, 2048, True),  # 6,000 tokens of English
        (24_000, 40, 2048, True),  # all but the last message left out
        (8_000, 2000, 2048, False),
        (30, 9, 2048, False),
        (200, 16, 16, True),
        (9_000, 1800, 4096, False),
        (400_000, 90_000, 131_072, False),
        (400_000, 9, 0, True),
        (300, 2, 0, False),
        (24_000, 0, 2048, False),  # an Ollama that does not count
    ],
)
def test_a_cut_prompt_is_known_by_what_was_read_of_it(size: int, read: int, context: int, cut: bool) -> None:
    assert was_cut(size, read, context) is cut


@pytest.mark.parametrize(
    ("event", "read"),
    [
        ({"done": True, "prompt_eval_count": 7}, 7),
        ({"choices": [], "usage": {"prompt_tokens": 8}}, 8),
        ({"message": {"content": '"prompt_tokens": 5'}, "done": False}, 0),
        ({"prompt_eval_count": "x"}, 0),
        ([{"prompt_tokens": 1}], 0),
    ],
)
def test_the_last_event_tells_what_was_read(event: Any, read: int) -> None:
    assert tokens_read(json.dumps(event).encode()) == read


def test_all_texts_count_and_odd_ones_are_none() -> None:
    parts = [{"type": "text", "text": "b  b"}, {"type": "image_url"}, None]
    messages: list[Any] = [{"content": "aa"}, {"content": parts}, {"content": None}, 5]
    assert prompt_size({"messages": messages, "system": "c", "prompt": None}) == 9
    assert prompt_size({"messages": "x"}) == 0


def test_the_warning_is_there_with_the_last_event() -> None:
    routing = Routing(Backend.OLLAMA, Engine.OLLAMA, "demo", "a", "")
    cut = CutPrompt(routing, {"prompt": "x " * 99}, lambda: 16)
    cut.look([b'{"response":"a"}'])
    assert not routing.warnings
    cut.look([b'{"done":true,"prompt_eval_count":16}'])
    assert "context of 16 tokens" in routing.warnings[0]
