"""Answers continue exactly after the death of any node."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sollold.client.sync_wrapper import HybridRouter, OllamaPool
from tests.client.conftest import BIG, SMALL
from tests.daemons import Cluster, Node, until

pytestmark = [pytest.mark.cluster, pytest.mark.llama, pytest.mark.timeout(600)]

KILLS = int(os.environ.get("SOLLOLD_TEST_KILLS", "4"))
OPTIONS: dict[str, Any] = {"temperature": 0, "max_tokens": 200}


def check_recital(
    records: Iterator[dict[str, Any]], at: int, inject_fault: Callable[[], None]
) -> dict[str, Any]:
    """Read a stream, call ``strike`` after ``at`` records, check the text, and return the last record."""
    text: list[str] = []
    last: dict[str, Any] = {}
    for number, record in enumerate(records, 1):
        if number == at:
            inject_fault()
        text.append(record["message"]["content"] if "message" in record else record["response"])
        last = record
    words = "".join(text).split()
    assert words == [f"w{number:04d}" for number in range(1, 201)]
    assert last["done"] and last["eval_count"] == 200
    return last


def load(cluster: Cluster, model: str) -> Node:
    """Load ``model`` and return the node that runs it."""
    reply = cluster[0].ask("POST", "/api/cluster/load", {"model": model})
    assert reply.status == 200, reply.body
    return next(node for node in cluster if node.name == reply.json["node_name"])


def names(router: HybridRouter) -> list[str]:
    """Return the names of the cluster's models."""
    pool = OllamaPool([known.url for known in router.asynchronous.ollama_pool.client.nodes])
    with pool:
        return sorted(model["name"] for model in pool.list())


@pytest.mark.parametrize("path", ["chat", "generate"])
def test_a_stream_continues_when_its_node_is_killed(cluster: Cluster, path: str) -> None:
    head = load(cluster, BIG)
    other = next(node for node in cluster if node is not head)
    with HybridRouter(node=other.url) as router:
        router.get_stats()
        assert router.should_use_distributed(BIG)
        if path == "chat":
            messages = [{"role": "user", "content": "count"}]
            records = router.route_request(BIG, messages, stream=True, **OPTIONS)
        else:
            records = router.generate(BIG, "count", stream=True, **OPTIONS)
        last = check_recital(records, 60, other.kill)
        assert last["_routing"]["lost_nodes"] == [other.name]
        assert last["_routing"]["resumed"] >= 1
        assert last["_routing"]["backend"] == "llama.cpp-distributed"
        # Another node answers from now on. The old one is used again after its return.
        messages = [{"role": "user", "content": "count"}]
        assert router.route_request(BIG, messages, max_tokens=3)["message"]["content"].split()[0] == "w0001"
        other.start()
        known = router.asynchronous.ollama_pool.client.nodes
        until(lambda: bool(other.state()), "the node is back")

        def used_again() -> bool:
            router.get_stats()
            return next(iter(known.order())).url == other.url and not known.order()[0].failures

        until(used_again, "the returned node is used again")


def test_a_stream_continues_when_the_head_is_the_clients_node(cluster: Cluster) -> None:
    head = load(cluster, SMALL)
    with OllamaPool(nodes=head.url) as pool:
        pool.list()
        records = pool.chat(SMALL, [{"role": "user", "content": "count"}], stream=True, **OPTIONS)
        last = check_recital(records, 10, head.kill)
        assert last["_routing"]["lost_nodes"] == [head.name]
        assert last["_routing"]["node"] != head.name


def test_a_stream_continues_when_its_node_hangs(cluster: Cluster) -> None:
    head = load(cluster, BIG)
    other = next(node for node in cluster if node is not head)
    process = other.process
    assert process is not None
    with OllamaPool(other.url) as pool:
        pool.list()
        records = pool.chat(BIG, [{"role": "user", "content": "count"}], stream=True, **OPTIONS)
        try:
            last = check_recital(records, 40, lambda: process.send_signal(signal.SIGSTOP))
        finally:
            process.send_signal(signal.SIGCONT)
        assert last["_routing"]["lost_nodes"] == [other.name]


def test_a_stream_leaves_a_node_that_shuts_down(cluster: Cluster) -> None:
    with HybridRouter(node=cluster[2].url) as router:
        router.get_stats()
        router.route_request(BIG, [{"role": "user", "content": "count"}], max_tokens=1)
        stopping = threading.Thread(target=cluster[2].stop)
        records = router.route_request(BIG, [{"role": "user", "content": "count"}], stream=True, **OPTIONS)
        check_recital(records, 30, stopping.start)
        stopping.join(60)


def test_a_non_streamed_answer_and_the_next_request_survive(cluster: Cluster) -> None:
    with HybridRouter(node=cluster[1].url) as router:
        router.get_stats()
        router.route_request(SMALL, [{"role": "user", "content": "count"}], max_tokens=1)
        killer = threading.Timer(0.3, cluster[1].kill)
        killer.start()
        answer = router.route_request(
            SMALL, [{"role": "user", "content": "count"}], max_tokens=300, temperature=0
        )
        killer.join()
        assert len(answer["message"]["content"].split()) == answer["eval_count"] == 300
        assert [name.split(":")[0] for name in names(router)] == [BIG, SMALL]


@pytest.mark.timeout(300 + 90 * KILLS)
def test_many_kills(cluster: Cluster) -> None:
    """A few kills by default; ``SOLLOLD_TEST_KILLS=50`` for a long run."""
    chance = random.Random(15)
    gaps: list[float] = []
    with HybridRouter(node=[node.url for node in cluster]) as router:
        router.route_request(BIG, [{"role": "user", "content": "count"}], max_tokens=1)
        nodes = router.asynchronous.ollama_pool.client.nodes
        for turn in range(KILLS):
            url = nodes.order()[0].url
            victim = next(node for node in cluster if node.url == url)
            records = router.route_request(
                BIG, [{"role": "user", "content": "count"}], stream=True, **OPTIONS
            )
            last = check_recital(records, chance.randrange(2, 150), victim.kill)
            assert last["_routing"]["lost_nodes"] == [victim.name], turn
            gaps.append(last["_routing"]["gap_ms"])
            victim.start()
            cluster.together()
    gaps.sort()
    print(f"{KILLS} kills, all exact; gap median {gaps[len(gaps) // 2]:.0f} ms, longest {gaps[-1]:.0f} ms")
