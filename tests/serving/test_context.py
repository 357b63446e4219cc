"""The context of a request: the default, and prompts that are too long."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from sollold.cluster.gossip.record import Asked, Backend, Endpoint, State
from sollold.errors import Fault, Refusal
from sollold.serving.candidate import EndpointQuery
from sollold.serving.context_size import ANSWER_TOKENS, larger_context
from sollold.serving.loader import Ready
from sollold.serving.request import Answer, Engine
from sollold.serving.router import Router
from sollold.settings.schema import HttpSettings, PlacementSettings
from tests.doubles import record
from tests.serving.cluster_double import MODEL, Cluster, Node, ask, text_of
from tests.serving.reciter import TEXT, Reciter

USUAL = PlacementSettings().context


async def fetch(node: Node, **more: Any) -> tuple[str, Answer]:
    answer = await node.serving.open(ask(**more), lambda _: None)
    events = [json.loads(event) async for event in answer.events]
    return text_of(events), answer


async def node_with_endpoint(cluster: Cluster, context: int, *, asked: int) -> tuple[Node, Reciter]:
    """Node a with a llama-server of ``context`` tokens per request, loaded with ``asked`` requested."""
    a, reciter = await cluster.node("a"), await cluster.reciter()
    reciter.context = context
    a.engines.serve("d1", reciter)
    change(a, "d1", context=context, asked=Asked(context=asked))
    return a, reciter


def change(node: Node, deployment: str, **changes: Any) -> None:
    endpoints = [
        replace(endpoint, **changes) if endpoint.id == deployment else endpoint
        for endpoint in node.view.me.endpoints
    ]
    node.view.update_me(endpoints=tuple(endpoints))


@pytest.mark.parametrize(
    ("named", "context", "asked", "fits"),
    [
        (0, 2048, 2048, False),
        (0, 2048, USUAL, True),
        (0, 2048, 0, True),
        (0, 16384, 16384, True),
        (0, USUAL, USUAL, True),
        (6000, 2048, 2048, False),
        (6000, 2048, USUAL, False),
        (1024, 2048, 2048, True),
    ],
)
def test_a_request_without_a_context_needs_the_configured_one(
    named: int, context: int, asked: int, fits: bool
) -> None:
    endpoint = Endpoint(
        "d1", MODEL, "", Backend.LOCAL, State.READY, context=context, asked=Asked(context=asked)
    )
    query = EndpointQuery(MODEL, frozenset((Engine.LLAMA,)), context=named, usual=USUAL)
    ranked = Router("a").rank([replace(record("a"), endpoints=(endpoint,))], query, 0.0)
    assert bool(ranked) is fits


async def test_a_too_long_prompt_is_retried_with_a_larger_context(cluster: Cluster) -> None:
    a, small = await node_with_endpoint(cluster, USUAL, asked=USUAL)
    large = await cluster.reciter()
    small.prompt = large.prompt = 36_000
    large.context = 65536

    async def load() -> Ready:
        a.engines.drop("d1")
        a.engines.serve("d2", large)
        change(a, "d2", context=65536, asked=Asked(context=40_096))
        return Ready("a", a.view.me.endpoints[-1])

    a.loader.load = load
    text, _ = await fetch(a)
    assert text == TEXT
    (need,) = a.loader.needs
    assert need.ask.context == 36_000 + ANSWER_TOKENS
    assert (len(small.requests), len(large.requests)) == (1, 1)


async def test_an_explicit_context_is_not_enlarged(cluster: Cluster) -> None:
    a, small = await node_with_endpoint(cluster, 4096, asked=4096)
    small.prompt = 6000
    with pytest.raises(Refusal, match=r"6000 tokens\) exceeds"):
        await fetch(a, context=4096)
    assert a.loader.loads == 0


@pytest.mark.parametrize("given", [0, USUAL])
async def test_a_prompt_too_long_for_every_node_is_refused_with_the_setting_name(
    cluster: Cluster, given: int
) -> None:
    a, small = await node_with_endpoint(cluster, USUAL, asked=USUAL)
    small.prompt = 36_000

    async def load() -> Ready:
        if not given:
            raise Refusal(Fault.TOO_BIG, "3 GiB are missing.")
        return Ready("a", a.view.me.endpoints[0], ("a context of 40096 tokens does not fit anywhere",))

    a.loader.load = load
    with pytest.raises(Refusal) as refused:
        await fetch(a)
    why = "does not fit anywhere" if given else "3 GiB are missing"
    assert why in refused.value.message and "placement.context" in refused.value.message
    assert "exceeds the available context size (8192 tokens)" in refused.value.message
    assert (refused.value.fault, refused.value.status) == (Fault.ENGINE, 400)
    assert len(small.requests) == 1


async def test_if_a_long_answer_does_not_fit_the_context_fits_the_prompt(cluster: Cluster) -> None:
    a, small = await node_with_endpoint(cluster, USUAL, asked=USUAL)
    large = await cluster.reciter()
    small.prompt = large.prompt = 36_000
    large.context = 36_864

    async def load() -> Ready:
        if a.loader.needs[-1].ask.context > large.context:
            raise Refusal(Fault.TOO_BIG, "3 GiB are missing.")
        a.engines.drop("d1")
        a.engines.serve("d2", large)
        change(a, "d2", context=large.context, asked=Asked(context=36_256))
        return Ready("a", a.view.me.endpoints[-1])

    a.loader.load = load
    assert (await fetch(a))[0] == TEXT
    assert [need.ask.context for need in a.loader.needs] == [36_000 + ANSWER_TOKENS, 36_256]


async def test_a_smaller_context_than_requested_is_a_warning(cluster: Cluster) -> None:
    a, _ = await node_with_endpoint(cluster, 4096, asked=USUAL)

    async def load() -> Ready:
        return Ready("a", a.view.me.endpoints[0], ("a context of 100000 tokens does not fit anywhere",))

    a.loader.load = load
    text, answer = await fetch(a, context=100_000)
    assert text == TEXT
    (warning,) = answer.routing.warnings
    assert "4096 tokens instead of the requested 100000" in warning
    _, answer = await fetch(a, context=4096)
    assert answer.routing.warnings == ()


def test_larger_context_for_a_long_prompt() -> None:
    refusal = Refusal(Fault.ENGINE, "request (9000 tokens) exceeds the available context size (8192 tokens)")
    assert larger_context(refusal, {}, 0) == 9000 + ANSWER_TOKENS
    assert larger_context(refusal, {"max_tokens": 100}, 0) == 9100
    assert larger_context(refusal, {"n_predict": -1}, 10_000) == 10_000
    assert larger_context(refusal, {}, 9000) == 0
    assert larger_context(Refusal(Fault.ENGINE, "no"), {}, 0) == 0


async def test_the_default_context_follows_reloaded_settings(cluster: Cluster) -> None:
    a, _ = await node_with_endpoint(cluster, USUAL, asked=USUAL)
    assert (await fetch(a))[0] == TEXT and a.loader.loads == 0

    async def refused() -> None:
        raise Refusal(Fault.TOO_BIG, "no room")

    a.loader.load = refused
    more = replace(PlacementSettings(), context=2 * USUAL)
    a.serving.use_settings(cluster.settings, HttpSettings(), more)
    with pytest.raises(Refusal):
        await fetch(a)
    assert a.loader.loads == 1
