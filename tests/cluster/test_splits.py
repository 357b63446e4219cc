"""Five real daemons with real engines: partitions, a leader that dies and a joining node during responses.

``make splits`` runs more rounds of partitions, or repeats them: it sets ``SOLLOLD_TEST_SPLITS`` and
``SOLLOLD_TEST_SEED``.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sollold.engines.install.find import Llama
from sollold.models.gguf.demo_model import Recital, counting, write
from sollold.units import parse_bytes
from tests import netns
from tests.chaos.callers import DIALECTS, Caller, Stream
from tests.chaos.faults import engines
from tests.chaos.round import MEMORY, RECITAL, SETTINGS
from tests.daemons import Cluster, Node, until

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.llama,
    pytest.mark.skipif(bool(netns.available()), reason=netns.available()),
]

NODES = 5
ROUNDS = int(os.environ.get("SOLLOLD_TEST_SPLITS", "3"))
SEED = int(os.environ.get("SOLLOLD_TEST_SEED", "7"))
LIMIT = parse_bytes(MEMORY)
"""Bytes that a node may grant. The model needs two nodes."""
HEAL_SECONDS = 30.0
JOINS = 3
CHAT = DIALECTS[0]


class ClusterChecks:
    """Checks of the nodes' states; each read asserts that no node grants more than its limit."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def states(self) -> list[dict[str, Any]]:
        """The state of the cluster as each node reports it."""
        states = [node.state() for node in self._cluster]
        for state in states:
            for node in state.get("nodes", []):
                assert node["granted"] <= LIMIT, f"{node['name']} granted {node['granted']} of {LIMIT}"
        return states

    def is_split(self, *sides: list[int]) -> bool:
        """Return whether each side is a cluster of its own with a leader."""
        states = self.states()
        return all(
            states[index].get("leader") and len(states[index]["nodes"]) == len(side)
            for side in sides
            for index in side
        )

    def inconsistency(self) -> str:
        """Return what differs from one leader, all nodes and only the grants of live deployments, or ""."""
        states = self.states()
        leaders = {(state.get("leader"), state.get("term")) for state in states}
        if len(leaders) != 1 or not states[0].get("leader"):
            return f"leaders: {leaders}"
        for state in states:
            if len(state["nodes"]) != len(states):
                return f"{state['name']} sees {len(state['nodes'])} nodes"
            deployments = [item for item in state["deployments"] if item["state"] != "failed"]
            expected = dict.fromkeys((node["node"] for node in state["nodes"]), 0)
            for deployment in deployments:
                for placed in deployment["placed"]:
                    expected[placed["node"]] += placed["bytes"]
            for node in state["nodes"]:
                if node["granted"] != expected[node["node"]]:
                    return f"{node['name']} granted {node['granted']}, expected {expected[node['node']]}"
        return ""

    def wait_until_consistent(self, description: str) -> float:
        """Wait until there is no inconsistency; return the seconds that took."""
        began, last = time.monotonic(), [""]

        def consistent() -> bool:
            last[0] = self.inconsistency()
            return not last[0]

        try:
            until(consistent, description, HEAL_SECONDS, 0.2)
        except AssertionError as error:
            raise AssertionError(f"{error}: {last[0]}") from None
        return time.monotonic() - began


def random_split(chance: random.Random) -> tuple[list[int], list[int]]:
    minority = sorted(chance.sample(range(NODES), chance.choice((1, 2))))
    return minority, [node for node in range(NODES) if node not in minority]


MinoritySpans = list[tuple[Node, float, float]]
"""(a node of a minority, start, end of the split): its callers may get errors because memory is missing."""


def check_streams(streams: list[Stream], spans: MinoritySpans) -> None:
    """Assert that each stream has all words in order, or a clear error where one is allowed."""
    for stream in streams:
        assert not stream.what_is_wrong(), stream.what_is_wrong()
        assert not stream.hung and not stream.broken, f"{stream.node.name}: {stream.error}"
        if stream.error and not any(
            node is stream.node and began <= stream.ended and stream.began <= ended
            for node, began, ended in spans
        ):
            raise AssertionError(f"{stream.node.name}, after {len(stream.words)} words: {stream.error}")


def summary(streams: list[Stream]) -> str:
    exact = [stream for stream in streams if not stream.error]
    resumed = sum(bool(stream.resumed) for stream in exact)
    return f"{len(exact)} exact answers, {resumed} of them resumed; {len(streams) - len(exact)} clear errors"


@pytest.mark.timeout(120 + ROUNDS * 60)
def test_splits_end_with_one_leader_and_exact_grants(tmp_path: Path, llama: Llama) -> None:
    chance = random.Random(SEED)
    model = tmp_path / "count.gguf"
    write(model, RECITAL)
    with Cluster(NODES, tmp_path, llama, memory=MEMORY, settings=SETTINGS, start=False) as cluster:
        assert cluster.lan is not None
        for node in cluster:
            (node.models / "count.gguf").symlink_to(model)
            node.start()
        cluster.together()
        checks = ClusterChecks(cluster)
        spans: MinoritySpans = []
        callers = [Caller(cluster[index], CHAT, "count", (200, 300), SEED + index) for index in (0, 3)]
        for caller in callers:
            caller.start()
        try:
            for turn in range(ROUNDS):
                before = [caller.last_word() for caller in callers]
                until(
                    lambda: all(c.last_word() > b for c, b in zip(callers, before, strict=True)),  # noqa: B023
                    f"words before round {turn}",
                    120,
                )
                minority, majority = random_split(chance)
                began = time.monotonic()
                cluster.lan.partition(minority, majority)
                if chance.random() < 0.75:
                    # Long enough for two clusters with a leader each, which both may grant memory.
                    until(
                        lambda: checks.is_split(minority, majority),  # noqa: B023
                        "each side has its own leader",
                        20,
                        0.3,
                    )
                end = time.monotonic() + chance.uniform(0.5, 5)
                while time.monotonic() < end:
                    checks.states()
                    time.sleep(0.3)
                cluster.lan.heal()
                took = checks.wait_until_consistent(
                    f"round {turn}: consistent after {minority} and {majority} are connected again"
                )
                print(f"round {turn + 1}: {minority} split from {majority}; {took:.1f} s until consistent")
                spans += [(cluster[index], began, time.monotonic()) for index in minority]
        finally:
            for caller in callers:
                caller.stop()
            for caller in callers:
                caller.join(220)
        for caller in callers:
            assert not caller.is_alive(), f"{caller.name} is still waiting"
            assert caller.streams
            print(f"{caller.node.name}: {summary(caller.streams)}")
            check_streams(caller.streams, spans)
        checks.wait_until_consistent("consistent at the end")
        unload_all(cluster)


def unload_all(cluster: Cluster) -> None:
    """Unload all models; wait until all memory is released and all engines have ended."""

    def unloaded() -> bool:
        remaining = [item for item in cluster.deployments() if item["state"] != "failed"]
        for deployment in remaining:
            cluster[0].ask("POST", "/api/cluster/unload", {"model": deployment["id"], "force": True})
        return not remaining

    def free() -> bool:
        return not any(node["granted"] for node in cluster[0].state()["nodes"])

    until(unloaded, "every deployment is unloaded", 60, 0.5)
    until(free, "all memory is released", 30, 0.2)
    until(lambda: not any(engines(node) for node in cluster), "every engine has ended", 30, 0.2)


SMALL = Recital(counting(2000), name="small", hidden=20_480, layers=3)


@pytest.fixture(scope="module")
def led(tmp_path_factory: pytest.TempPathFactory, llama: Llama) -> Iterator[Cluster]:
    """A cluster whose leader, node0, has no memory for models. node2 has the only model; node4 is down."""
    folder = tmp_path_factory.mktemp("led")
    each: list[dict[str, Any]] = [{"node.memory_limit": "1 MiB"}, *({} for _ in range(NODES - 1))]
    settings = {"placement.context": 4096, "placement.slots": 2}
    with Cluster(NODES, folder, llama, each=each, settings=settings, start=False) as cluster:
        write(cluster[2].models / "small.gguf", SMALL)
        # The first node leads, and nodes that join do not replace it.
        cluster[0].start()
        until(lambda: cluster[0].state().get("leader_name") == "node0", "node0 leads")
        for node in cluster.nodes[1:4]:
            node.start()
        cluster.together()
        yield cluster


@pytest.mark.timeout(240)
def test_a_joining_node_answers_and_is_seen_within_two_seconds(led: Cluster) -> None:
    assert led[1].ask("POST", "/api/chat", CHAT.body("small", 3)).status == 200
    joining, took = led[4], []
    for _ in range(JOINS):
        joining.start()
        until(lambda: is_started(joining), "it has started", 30, 0.02)
        ready = time.monotonic()
        until(lambda: answers_chat(joining), "it answers for a model that another node has", 20, 0.05)
        for node in led.nodes[:4]:
            until(lambda: "node4" in node.sees(), f"{node.name} sees it", 20, 0.02)  # noqa: B023
        took.append(time.monotonic() - ready)
        joining.stop()
        until(lambda: all("node4" not in node.sees() for node in led.nodes[:4]), "it is gone", 20)
    # The machine may have been busy during one of the joins.
    assert statistics.median(took) < 2.0, took


def is_started(node: Node) -> bool:
    try:
        return node.ask("GET", "/api/version", timeout=5).status == 200
    except OSError:
        return False


def answers_chat(node: Node) -> bool:
    reply = node.ask("POST", "/api/chat", CHAT.body("small", 3), timeout=20)
    return reply.status == 200 and reply.lines[-1].get("done") is True


@pytest.mark.timeout(240)
def test_a_dead_leader_is_replaced_within_three_seconds_without_interrupting_streams(
    led: Cluster,
) -> None:
    assert led[1].state()["leader_name"] == "node0"
    caller = Caller(led[1], CHAT, "small", (1900, 1900), 1)
    caller.start()
    until(lambda: caller.current and len(caller.current.times) > 5, "the stream has begun", 60)
    stream = caller.current
    assert stream is not None
    remaining = [node for node in led if node.index in (1, 2, 3)]
    led[0].kill()
    until(lambda: all("node0" not in node.sees() for node in remaining), "no node sees it", 10, 0.02)
    known = time.monotonic()

    def new_leader() -> bool:
        leaders = {node.state().get("leader_name") for node in remaining}
        return len(leaders) == 1 and not leaders & {None, "", "node0"}

    until(new_leader, "another leads", 10, 0.02)
    took = time.monotonic() - known
    assert caller.current is stream, "the response ended before another node led"
    caller.stop()
    caller.join(220)
    assert not caller.is_alive()
    check_streams(caller.streams, [])
    assert stream.resumed == 0
    assert took < 3.0
