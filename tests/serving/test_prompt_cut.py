"""Ollama truncates prompts silently; its token counts reveal it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sollold.cluster.gossip.record import Backend
from sollold.serving.prompt_cut import CutPrompt, prompt_size, tokens_read, was_cut
from sollold.serving.request import Engine, Routing
from tests.serving.cluster_double import Cluster, ask


@pytest.mark.parametrize(
    ("size", "read", "context", "cut"),
    [
        (24_000, 2046, 2048, True),  # 6,000 tokens of English
        (24_000, 40, 2048, True),  # all messages but the last dropped
        (8_000, 2000, 2048, False),
        (30, 9, 2048, False),
        (200, 16, 16, True),
        (9_000, 1800, 4096, False),
        (400_000, 90_000, 131_072, False),
        (400_000, 9, 0, True),
        (300, 2, 0, False),
        (24_000, 0, 2048, False),  # an Ollama without token counts
    ],
)
def test_a_truncated_prompt_is_detected_by_its_token_count(
    size: int, read: int, context: int, cut: bool
) -> None:
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
def test_prompt_tokens_of_the_last_event(event: Any, read: int) -> None:
    assert tokens_read(json.dumps(event).encode()) == read


def test_the_size_of_a_prompt_counts_all_texts() -> None:
    parts = [{"type": "text", "text": "b  b"}, {"type": "image_url"}, None]
    messages: list[Any] = [{"content": "aa"}, {"content": parts}, {"content": None}, 5]
    assert prompt_size({"messages": messages, "system": "c", "prompt": None}) == 9
    assert prompt_size({"messages": "x"}) == 0


def test_the_warning_appears_with_the_last_event() -> None:
    routing = Routing(Backend.OLLAMA, Engine.OLLAMA, "demo", "a", "")
    cut = CutPrompt(routing, {"prompt": "x " * 99}, lambda: 16)
    cut.look([b'{"response":"a"}'])
    assert not routing.warnings
    cut.look([b'{"done":true,"prompt_eval_count":16}'])
    assert "context of 16 tokens" in routing.warnings[0]


@pytest.mark.parametrize(("form", "context"), [("chat", 4096), ("ollama", 99_999)])
async def test_the_warning_names_the_context_that_ollama_was_given(
    cluster: Cluster, form: str, context: int
) -> None:
    """``/v1`` of Ollama takes no context, so the loaded model's context applies."""
    node, reciter = await cluster.node("b"), await cluster.reciter()
    node.engines.serve("ollama:m", reciter, backend=Backend.OLLAMA)
    (call,) = ask(form, messages=[{"role": "user", "content": "word " * 20_000}]).calls.values()
    answer = await node.serving.open(ask(form, calls={Engine.OLLAMA: call}, context=99_999), lambda _: None)
    assert [event async for event in answer.events]
    warnings = [warning for warning in answer.routing.warnings if "longer than the context" in warning]
    assert bool(warnings) is (context == 4096) and all("of 4096 tokens" in warning for warning in warnings)
