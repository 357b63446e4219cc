"""A node continues an answer that another node began."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sollold.cluster.gossip.record import Backend
from sollold.errors import Fault, Refusal
from sollold.serving.request import Delivered, Engine
from tests.serving.cluster_double import Cluster, ask, text_of
from tests.serving.reciter import TEXT, WORDS

FORMS = ["chat", "text", "native", "ollama", "generate"]
OF_OLLAMA = ("ollama", "generate")


async def rest(
    cluster: Cluster, form: str, delivered: Delivered, **more: Any
) -> tuple[list[dict[str, Any]], Any]:
    node = await cluster.node("a")
    backend = Backend.OLLAMA if form in OF_OLLAMA else Backend.LOCAL
    node.engines.serve("d1", await cluster.reciter(), slots=2, backend=backend)
    answer = await node.serving.open(ask(form, delivered=delivered, **more), lambda _: None)
    return [json.loads(event) async for event in answer.events], answer


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [1, 7, 199])
async def test_only_the_rest_is_sent_and_all_tokens_are_counted(
    cluster: Cluster, form: str, count: int
) -> None:
    delivered = Delivered(content="".join(WORDS[:count]), events=count, spent_ms=1000.0)
    events, _ = await rest(cluster, form, delivered)
    assert text_of(events) == TEXT.removeprefix(delivered.content)
    last = json.dumps(events[-2:])
    counted = {"chat": "completion_tokens", "text": "completion_tokens", "native": "tokens_predicted"}
    assert f'"{counted.get(form, "eval_count")}": {len(WORDS)}' in last


@pytest.mark.parametrize("form", FORMS)
async def test_the_token_limit_covers_the_whole_answer(cluster: Cluster, form: str) -> None:
    limit: dict[str, Any] = {"options": {"num_predict": 10}} if form in OF_OLLAMA else {"max_tokens": 10}
    delivered = Delivered(content="".join(WORDS[:4]), events=4)
    events, _ = await rest(cluster, form, delivered, **limit)
    assert text_of(events) == "".join(WORDS[4:10])


@pytest.mark.parametrize("form", OF_OLLAMA)
async def test_an_answer_that_lacks_only_its_final_event_needs_no_engine(cluster: Cluster, form: str) -> None:
    delivered = Delivered(content="".join(WORDS[:10]), events=10, engine=Engine.OLLAMA)
    events, answer = await rest(cluster, form, delivered, options={"num_predict": 10})
    assert len(events) == 1 and events[0]["done_reason"] == "length" and events[0]["eval_count"] == 10
    assert answer.routing.engine is Engine.OLLAMA


@pytest.mark.parametrize(
    ("delivered", "more"),
    [
        (Delivered(content="a", events=1, tool_calls=True), {}),
        (Delivered(content="a", events=1), {"logprobs": True}),
    ],
)
async def test_answers_that_cant_be_continued_exactly_are_refused(
    cluster: Cluster, delivered: Delivered, more: dict[str, Any]
) -> None:
    with pytest.raises(Refusal, match="can't be continued exactly") as refused:
        await rest(cluster, "chat", delivered, **more)
    assert refused.value.fault is Fault.INTERRUPTED


async def test_each_node_counts_its_answers(cluster: Cluster) -> None:
    node = await cluster.node("a")
    node.engines.serve("d1", await cluster.reciter(), slots=2, backend=Backend.SHARDED)
    for delivered in (None, Delivered(content=WORDS[0], events=1)):
        answer = await node.serving.open(ask("chat", delivered=delivered), lambda _: None)
        assert [event async for event in answer.events]
    counters = node.serving._counters
    assert (counters.distributed, counters.local, counters.ollama, counters.resumed) == (2, 0, 0, 1)
