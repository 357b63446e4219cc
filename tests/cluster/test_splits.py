"""Five real daemons with real engines: splits, the leader's death, a node that joins, while answers run.

``make splits`` plays more rounds of splits, or replays them: it sets ``SOLLOLD_TEST_SPLITS`` and
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
"""`MEMORY`: what a node may grant. The model needs two nodes."""
HEALED_WITHIN = 30.0
JOINS = 3
CHAT = DIALECTS[0]


class Watch:
    """What must hold of the memory of every node at every moment that anybody looks."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def states(self) -> list[dict[str, Any]]:
        """What every node says, each of itself and of the others."""
        states = [node.state() for node in self._cluster]
        for state in states:
            for node in state.get("nodes", []):
                assert node["granted"] <= LIMIT, f"{node['name']} granted {node['granted']} of {LIMIT}"
        return states

    def parted(self, *sides: list[int]) -> bool:
        """Whether each side is a cluster of its own with a leader."""
        states = self.states()
        return all(
            states[at].get("leader") and len(states[at]["nodes"]) == len(side)
            for side in sides
            for at in side
        )

    def unrest(self) -> str:
        """What is not as it must be once the network is whole: one leader, every grant with its head."""
        states = self.states()
        leaders = {(state.get("leader"), state.get("term")) for state in states}
        if len(leaders) != 1 or not states[0].get("leader"):
            return f"leaders: {leaders}"
        for state in states:
            if len(state["nodes"]) != len(states):
                return f"{state['name']} sees {len(state['nodes'])} nodes"
            running = [one for one in state["deployments"] if one["state"] != "failed"]
            owed = dict.fromkeys((node["node"] for node in state["nodes"]), 0)
            for one in running:
                for placed in one["placed"]:
                    owed[placed["node"]] += placed["bytes"]
            for node in state["nodes"]:
                if node["granted"] != owed[node["node"]]:
                    return f"{node['name']} granted {node['granted']}, its heads hold {owed[node['node']]}"
        return ""

    def settled(self, what: str) -> float:
        """Wait until all is as it must be; the seconds that took."""
        began, seen = time.monotonic(), [""]

        def rest() -> bool:
            seen[0] = self.unrest()
            return not seen[0]

        try:
            until(rest, what, HEALED_WITHIN, 0.2)
        except AssertionError as error:
            raise AssertionError(f"{error}: {seen[0]}") from None
        return time.monotonic() - began


def halves(chance: random.Random) -> tuple[list[int], list[int]]:
    apart = sorted(chance.sample(range(NODES), chance.choice((1, 2))))
    return apart, [at for at in range(NODES) if at not in apart]


Short = list[tuple[Node, float, float]]
"""(a node on the smaller side of a split, from, until): its callers may be told that there is no room."""


def look_at(streams: list[Stream], short: Short) -> None:
    """Every word once and in order, to the end; a clear error only where it may be."""
    for stream in streams:
        assert not stream.what_is_wrong(), stream.what_is_wrong()
        assert not stream.hung and not stream.broken, f"{stream.node.name}: {stream.error}"
        if stream.error and not any(
            node is stream.node and began <= stream.ended and stream.began <= ended
            for node, began, ended in short
        ):
            raise AssertionError(f"{stream.node.name}, after {len(stream.words)} words: {stream.error}")


def told(streams: list[Stream]) -> str:
    exact = [stream for stream in streams if not stream.error]
    resumed = sum(bool(stream.resumed) for stream in exact)
    return f"{len(exact)} exact answers, {resumed} of them resumed; {len(streams) - len(exact)} clear errors"


@pytest.mark.timeout(120 + ROUNDS * 60)
def test_splits_end_with_one_leader_and_no_grant_lost_or_doubled(tmp_path: Path, llama: Llama) -> None:
    chance = random.Random(SEED)
    model = tmp_path / "count.gguf"
    write(model, RECITAL)
    with Cluster(NODES, tmp_path, llama, memory=MEMORY, settings=SETTINGS, start=False) as cluster:
        assert cluster.lan is not None
        for node in cluster:
            (node.models / "count.gguf").symlink_to(model)
            node.start()
        cluster.together()
        watch = Watch(cluster)
        short: Short = []
        callers = [Caller(cluster[at], CHAT, "count", (200, 300), SEED + at) for at in (0, 3)]
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
                one, other = halves(chance)
                began = time.monotonic()
                cluster.lan.partition(one, other)
                if chance.random() < 0.75:
                    # Long enough for two clusters, each with its leader, that both may grant.
                    until(lambda: watch.parted(one, other), "both halves know", 20, 0.3)  # noqa: B023
                end = time.monotonic() + chance.uniform(0.5, 5)
                while time.monotonic() < end:
                    watch.states()
                    time.sleep(0.3)
                cluster.lan.heal()
                took = watch.settled(f"round {turn}: after {one} and {other} met again all is in order")
                print(f"round {turn + 1}: {one} apart from {other}; in order {took:.1f} s after they met")
                short += [(cluster[at], began, time.monotonic()) for at in one]
        finally:
            for caller in callers:
                caller.stop()
            for caller in callers:
                caller.join(220)
        for caller in callers:
            assert not caller.is_alive(), f"{caller.name} still waits"
            assert caller.streams
            print(f"{caller.node.name}: {told(caller.streams)}")
            look_at(caller.streams, short)
        watch.settled("all is in order at the end")
        unload_all(cluster)


def unload_all(cluster: Cluster) -> None:
    """Every byte is given back, and no engine outlives its deployment."""

    def unloaded() -> bool:
        there = [found for found in cluster.deployments() if found["state"] != "failed"]
        for found in there:
            cluster[0].ask("POST", "/api/cluster/unload", {"model": found["id"], "force": True})
        return not there

    def free() -> bool:
        return not any(one["granted"] for one in cluster[0].state()["nodes"])

    until(unloaded, "every deployment is unloaded", 60, 0.5)
    until(free, "every byte is given back", 30, 0.2)
    until(lambda: not any(engines(node) for node in cluster), "every engine has ended", 30, 0.2)


SMALL = Recital(counting(2000), name="small", hidden=20_480, layers=3)


@pytest.fixture(scope="module")
def led(tmp_path_factory: pytest.TempPathFactory, llama: Llama) -> Iterator[Cluster]:
    """A cluster whose leader, node0, has no room for any model; node2 has the only one. node4 is down."""
    folder = tmp_path_factory.mktemp("led")
    each: list[dict[str, Any]] = [{"node.memory_limit": "1 MiB"}, *({} for _ in range(NODES - 1))]
    settings = {"placement.context": 4096, "placement.slots": 2}
    with Cluster(NODES, folder, llama, each=each, settings=settings, start=False) as cluster:
        write(cluster[2].models / "small.gguf", SMALL)
        # Who is there first leads, and whoever joins unseats nobody.
        cluster[0].start()
        until(lambda: cluster[0].state().get("leader_name") == "node0", "the first leads")
        for node in cluster.nodes[1:4]:
            node.start()
        cluster.together()
        yield cluster


@pytest.mark.timeout(240)
def test_a_node_that_joins_answers_and_is_known_within_two_seconds(led: Cluster) -> None:
    assert led[1].ask("POST", "/api/chat", CHAT.body("small", 3)).status == 200
    joining, took = led[4], []
    for _ in range(JOINS):
        joining.start()
        until(lambda: answers(joining), "its start is ready", 30, 0.02)
        ready = time.monotonic()
        until(lambda: asked(joining), "it answers for a model that another node has", 20, 0.05)
        for node in led.nodes[:4]:
            until(lambda: "node4" in node.sees(), f"{node.name} knows it", 20, 0.02)  # noqa: B023
        took.append(time.monotonic() - ready)
        joining.stop()
        until(lambda: all("node4" not in node.sees() for node in led.nodes[:4]), "it is gone", 20)
    # One of them may have met a machine that was busy with something else.
    assert statistics.median(took) < 2.0, took


def answers(node: Node) -> bool:
    try:
        return node.ask("GET", "/api/version", timeout=5).status == 200
    except OSError:
        return False


def asked(node: Node) -> bool:
    reply = node.ask("POST", "/api/chat", CHAT.body("small", 3), timeout=20)
    return reply.status == 200 and reply.lines[-1].get("done") is True


@pytest.mark.timeout(240)
def test_a_leader_that_dies_is_followed_within_three_seconds_and_streams_of_others_go_on(
    led: Cluster,
) -> None:
    assert led[1].state()["leader_name"] == "node0"
    caller = Caller(led[1], CHAT, "small", (1900, 1900), 1)
    caller.start()
    until(lambda: caller.current and len(caller.current.times) > 5, "the stream runs", 60)
    stream = caller.current
    assert stream is not None
    left = [node for node in led if node.index in (1, 2, 3)]
    led[0].kill()
    until(lambda: all("node0" not in node.sees() for node in left), "its death is known", 10, 0.02)
    known = time.monotonic()

    def led_anew() -> bool:
        leaders = {node.state().get("leader_name") for node in left}
        return len(leaders) == 1 and not leaders & {None, "", "node0"}

    until(led_anew, "another leads", 10, 0.02)
    took = time.monotonic() - known
    assert caller.current is stream, "the answer was over before another led"
    caller.stop()
    caller.join(220)
    assert not caller.is_alive()
    look_at(caller.streams, [])
    assert stream.resumed == 0
    assert took < 3.0
