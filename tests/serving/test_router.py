"""The choice of the endpoint for a request."""

from __future__ import annotations

import heapq
from dataclasses import replace
from typing import Any

import pytest
from msgspec import structs

from sollold.cluster.gossip.record import Backend, Endpoint, InOllama, Placed, Record, State
from sollold.leader.wish import PlacementWish
from sollold.machine.device import Device, Kind
from sollold.serving.candidate import EndpointQuery
from sollold.serving.ranking import STRATEGIES
from sollold.serving.request import Engine
from sollold.serving.router import Breaker, Router

BOTH = frozenset((Engine.LLAMA, Engine.OLLAMA))
WISH = EndpointQuery("m:latest", BOTH)
READY = Endpoint("d", "m:latest", "x" * 64, Backend.LOCAL, State.READY, context=8192)
OLLAMA = replace(READY, id="ollama:m", backend=Backend.OLLAMA)


def record(node: str, *endpoints: Endpoint, **more: Any) -> Record:
    return replace(
        Record(node, node, 1, ("10.0.0.1",), 1, 2, "0", endpoints=endpoints),
        **more,
    )


def first(router: Router, *records: Record, wish: EndpointQuery = WISH, now: float = 0.0) -> str:
    ranked = router.rank(records, wish, now)
    return ranked[0].candidate.record.node if ranked else ""


def test_only_endpoints_that_can_answer_are_candidates() -> None:
    router = Router("me")
    cases = [
        replace(READY, state=State.LOADING),
        replace(READY, state=State.DRAINING),
        replace(READY, model="other", digest="y" * 64),
        replace(READY, embedding=True),
        replace(READY, context=100),
        replace(READY, closing=True),
    ]
    wish = structs.replace(WISH, context=4096, digest="x" * 64)
    for endpoint in cases:
        assert router.rank([record("a", endpoint)], wish, 0.0) == ()
    assert router.rank([record("a", READY, draining=True)], wish, 0.0) == ()
    assert first(router, record("a", READY), wish=wish) == "a"
    assert (
        first(router, record("a", OLLAMA), wish=structs.replace(wish, embedding=True, context=99999)) == "a"
    )
    assert (
        router.rank([record("a", OLLAMA)], structs.replace(wish, engines=frozenset((Engine.LLAMA,))), 0.0)
        == ()
    )


def test_a_sole_candidate_is_scored_only_on_request() -> None:
    router = Router("me")
    (scored,) = router.rank([record("a", READY)], WISH, 0.0)
    (sole,) = router.rank([record("a", READY)], WISH, 0.0, score_sole=False)
    assert scored.score and scored.marks
    assert sole.candidate == scored.candidate and not sole.marks
    two = router.rank([record("a", READY), record("b", READY)], WISH, 0.0, score_sole=False)
    assert all(score.marks for score in two), "several candidates are scored"


def test_the_leaders_choice_overrides_the_placement_wish() -> None:
    router = Router("me")
    wish = structs.replace(WISH, placement=PlacementWish(speculation="nobody"))
    assert router.rank([record("a", READY), record("b", READY)], wish, 0.0) == ()
    wish = structs.replace(wish, assigned=("b", "d"))
    assert first(router, record("a", READY), record("b", READY), wish=wish) == "b"


def test_the_digest_takes_precedence_over_the_name() -> None:
    router = Router("me")
    wish = structs.replace(WISH, digest="x" * 64)
    assert first(router, record("a", replace(READY, model="another name"))) == ""
    assert first(router, record("a", replace(READY, model="another name")), wish=wish) == "a"
    assert first(router, record("a", replace(READY, digest="z" * 64)), wish=wish) == ""


def test_an_ollama_answers_only_compatible_requests() -> None:
    router = Router("me")
    wish = structs.replace(WISH, digest="x" * 64, in_ollama=InOllama(("m:latest", "n:latest"), ("a" * 64,)))
    shut = replace(OLLAMA, digest="a" * 64)
    for endpoint, fits in (
        (OLLAMA, True),
        (replace(OLLAMA, model="n:latest"), True),
        (replace(OLLAMA, model="mario:latest"), False),
        (shut, True),
        (replace(shut, model="n:latest"), True),
        (replace(shut, digest="b" * 64), False),
        (replace(shut, backend=Backend.LOCAL), False),
    ):
        assert bool(router.rank([record("a", endpoint)], wish, 0.0)) == fits, endpoint


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ({}, {"loaded": False}),
        ({}, {"active": 1}),
        ({}, {"waiting": 1}),
        ({"speed": 40.0}, {"speed": 20.0}),
        ({"slots": 4, "active": 1}, {"slots": 1, "active": 1}),
        (
            {"placed": (Placed("a", "CUDA0", 0, 9, 1),)},
            {"placed": (Placed("b", "CPU", 0, 9, 1),)},
        ),
    ],
)
def test_scoring_rules(better: dict[str, Any], worse: dict[str, Any]) -> None:
    router = Router("me")
    for first_node, second_node in (("a", "b"), ("b", "a")):
        records = [
            record(first_node, replace(OLLAMA, **better)),
            record(second_node, replace(OLLAMA, **worse)),
        ]
        assert first(router, *records) == first_node


def test_the_loaded_context_matters_only_for_ollama() -> None:
    router = Router("me")
    wish = structs.replace(WISH, context=4096)
    same, other = replace(OLLAMA, context=4096), replace(OLLAMA, context=8192)
    assert first(router, record("a", other), record("b", same), wish=wish) == "b"
    assert first(router, record("b", same), record("a", other), wish=wish) == "b"


def test_an_ollama_that_must_load_needs_certain_memory() -> None:
    router = Router("me")
    ollama = replace(OLLAMA, loaded=False)
    cpu = Device("CPU", Kind.CPU, "cpu", 1000, 600, 1000, 0, 500)
    gpu = Device("CUDA0", Kind.GPU, "gpu", 500, 500, 500, 400, 100)
    far = Device("pc:1", Kind.EXTERNAL, "w", 9000, 9000, 9000, 0, 9000)
    idle = replace(OLLAMA, id="ollama:other", model="other", digest="o", bytes=200)
    busy = replace(idle, active=1)
    cases = [
        ((cpu,), (), 500, True),
        ((cpu,), (), 501, False),
        ((cpu, far), (), 501, False),
        ((cpu,), (idle,), 666, True),
        ((cpu,), (idle,), 668, False),
        ((cpu,), (busy,), 500, True),
        ((replace(cpu, free=1000),), (busy,), 668, False),
        ((replace(cpu, free=1000), gpu), (), 916, True),
        ((replace(cpu, free=1000), gpu), (), 918, False),
        ((), (), 1 << 40, True),
    ]
    for devices, others, size, fits in cases:
        node_record = record("a", ollama, *others, devices=devices)
        wish = structs.replace(WISH, digest=ollama.digest, size=size)
        assert bool(router.rank([node_record], wish, 0.0)) is fits, (devices, others, size)
        assert router.rank([node_record], structs.replace(wish, assigned=("a", ollama.id)), 0.0), (
            "the leader's choice needs no check of memory"
        )
        assert router.rank([replace(node_record, endpoints=(OLLAMA,))], wish, 0.0), (
            "a loaded model needs no memory"
        )


def test_long_contexts_and_sharded_models_are_left_to_the_leader() -> None:
    router = Router("me")
    found = [record("a", replace(OLLAMA, loaded=False))]
    assert router.rank(found, structs.replace(WISH, context=4096), 0.0)
    assert not router.rank(found, structs.replace(WISH, context=32768), 0.0)
    assert not router.rank(found, structs.replace(WISH, sharded=True), 0.0)


def test_local_node_wins_ties() -> None:
    assert first(Router("b"), record("a", READY), record("b", READY)) == "b"
    assert first(Router("a"), record("a", READY), record("b", READY)) == "a"


def test_a_conversation_stays_on_its_node_for_a_time() -> None:
    router = Router("me")
    records = [record("a", READY), record("b", READY)]
    wish = structs.replace(WISH, prefix="p")
    other = next(n for n in "ab" if n != first(router, *records, wish=wish))
    router.sent((other, "d"), wish, 0.0)
    router.ended((other, "d"), True)
    assert first(router, *records, wish=wish, now=10.0) == other
    assert first(router, *records, wish=structs.replace(wish, prefix="q"), now=10.0) != other
    assert first(router, *records, wish=wish, now=10_000.0) != other


def test_a_failed_endpoint_is_avoided_and_later_retried() -> None:
    router = Router("me")
    records = [record("a", READY), record("b", READY)]
    key = ("a", "d")
    for _ in range(3):
        router.sent(key, WISH, 0.0)
        router.failed(key, 0.0)
        router.ended(key, False)
    assert [c.candidate.record.node for c in router.rank(records, WISH, 0.1)] == ["b"]
    assert len(router.rank(records, WISH, 10.0)) == 2
    assert first(router, *records, now=10.0) == "b"


def test_round_robin_and_least_loaded_strategies() -> None:
    records = [record(name, READY) for name in "abc"]
    router = Router("me", "round_robin")
    turns = []
    for _ in range(6):
        turns.append(first(router, *records))
        assert first(router, *records) == turns[-1], "only a sent request takes a turn"
        assert router.better(records, WISH, 0.0, (turns[-1], "d")) is not None
        router.sent((turns[-1], "d"), WISH, 0.0)
        router.ended((turns[-1], "d"), True)
        # A request for another model takes no turn of this one.
        router.sent(("c", "other"), WISH, 0.0)
        router.ended(("c", "other"), True)
    assert turns == ["a", "b", "c"] * 2
    least = Router("me", "least_loaded")
    assert first(least, record("a", replace(READY, active=2)), record("b", READY)) == "b"
    quick = Router("me", "latency_first")
    for node, seconds in (("a", 0.5), ("b", 0.1)):
        quick.sent((node, "d"), WISH, 0.0)
        quick.began((node, "d"), seconds)
        quick.ended((node, "d"), True)
    assert first(quick, *records[:2]) == "b"


def test_scores_have_reasons() -> None:
    (choice,) = Router("me").rank([record("a", READY)], WISH, 0.0)
    assert "done soonest 1.00" in choice.why
    assert choice.score > 100


def test_state_of_vanished_endpoints_is_dropped() -> None:
    router = Router("me")
    for n in range(5000):
        wish = structs.replace(WISH, prefix=str(n))
        router.sent(("a", f"d{n}"), wish, 0.0)
        router.ended(("a", f"d{n}"), True)
    router.forget([record("a", READY)])
    assert len(router._memory) <= 1
    assert len(router._prefixes) <= 4096


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("strategy", ["intelligent"])
def test_a_pool_is_close_to_the_optimal_schedule(strategy: str, known: bool) -> None:
    """200 simultaneous requests for endpoints of speed 1, 1 and ½ with one slot each."""
    assert strategy in STRATEGIES
    speeds = {"a": 1.0, "b": 1.0, "c": 0.5}
    router = Router("me", strategy)
    reported = {node: speed * 50.0 if known else 0.0 for node, speed in speeds.items()}
    lines: dict[str, list[int]] = {node: [] for node in speeds}
    now, finished = 0.0, 0

    def records() -> list[Record]:
        return [
            record(
                node, replace(OLLAMA, speed=reported[node], active=min(1, len(q)), waiting=max(0, len(q) - 1))
            )
            for node, q in lines.items()
        ]

    ends: list[tuple[float, str]] = []
    for n in range(200):
        node = first(router, *records())
        router.sent((node, OLLAMA.id), WISH, now)
        lines[node].append(n)
        if len(lines[node]) == 1:
            heapq.heappush(ends, (now + 1 / speeds[node], node))
    while ends:
        now, node = heapq.heappop(ends)
        lines[node].pop(0)
        finished += 1
        reported[node] = speeds[node] * 50.0
        router.ended((node, OLLAMA.id), True)
        # A request in another queue moves to this free endpoint.
        if not lines[node]:
            longest = max(lines, key=lambda other: len(lines[other]))
            if len(lines[longest]) > 1:
                key = (longest, OLLAMA.id)
                better = router.better(records(), WISH, now, key)
                if better is not None:
                    lines[better.record.node].append(lines[longest].pop())
                    router.ended(key, None)
                    router.sent(better.key, WISH, now)
        if lines[node]:
            heapq.heappush(ends, (now + 1 / speeds[node], node))
    assert finished == 200
    assert now <= 1.1 * 200 / 2.5


def test_the_circuit_breaker_opens_probes_once_and_closes() -> None:
    breaker = Breaker(threshold=2, pause=2.0, longest=5.0)
    breaker.failed(0.0)
    breaker.reached()
    breaker.failed(0.0)
    assert breaker.allows(0.0)
    breaker.failed(0.0)
    assert not breaker.allows(1.9)
    assert breaker.allows(2.0)
    breaker.sent(2.0)
    assert not breaker.allows(2.0)
    breaker.failed(2.0)
    assert not breaker.allows(5.9)
    breaker.sent(6.0)
    breaker.given_up()
    assert breaker.allows(6.0)
    breaker.sent(6.0)
    breaker.reached()
    assert breaker.allows(6.0)
    breaker.failed(6.0)
    assert breaker.allows(6.0)
