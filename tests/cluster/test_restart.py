"""A model that needs every node: one of them is restarted or drained, and the answers go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sollold.engines.install.find import Llama
from sollold.models.gguf.demo_model import Recital, counting, write
from tests.chaos.faults import engines
from tests.daemons import Cluster, Node, until

pytestmark = [pytest.mark.cluster, pytest.mark.llama, pytest.mark.timeout(300)]

WORDS = 500
RECITAL = Recital(counting(WORDS), name="count", layers=3, width=256, hidden=40_960, heavy=True)
SETTINGS = {
    "placement.context": 768,
    "placement.slots": 1,
    "placement.ubatch": 32,
    "serving.drain_limit": 30,
}


@pytest.fixture
def cluster(tmp_path: Path, llama: Llama, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Two nodes, of which the model needs both; the first alone has its file."""
    settings = SETTINGS | getattr(request, "param", {})
    with Cluster(2, tmp_path, llama, memory="125 MiB", settings=settings, loopback=True) as cluster:
        write(cluster[0].models / "count.gguf", RECITAL)
        cluster.together()
        until(lambda: b"count" in cluster[0].ask("GET", "/api/tags").body, "the model is listed")
        yield cluster


class Asking(threading.Thread):
    """One streamed answer."""

    def __init__(self, node: Node, words: int) -> None:
        super().__init__(daemon=True)
        self.node = node
        self.words = words
        self.said = ""
        self.lines: list[dict[str, Any]] = []

    def run(self) -> None:
        options = {"temperature": 0, "num_predict": self.words}
        body = {"model": "count", "prompt": "count", "stream": True, "options": options}
        with self.node.open("POST", "/api/generate", body, timeout=120) as response:
            for line in response:
                self.lines.append(json.loads(line))
                self.said += self.lines[-1].get("response", "")

    def began(self) -> bool:
        return self.said.count(" ") >= 5

    def ended_exactly(self) -> dict[str, Any]:
        """Wait for its end; its last line."""
        self.join(120)
        assert not self.is_alive(), f"{self.said[-40:]!r}"
        assert self.said.split() == [f"w{number:04d}" for number in range(1, self.words + 1)], self.lines[-1]
        return self.lines[-1]


def ask(node: Node, words: int) -> Asking:
    asking = Asking(node, words)
    asking.start()
    until(asking.began, "words come")
    return asking


def test_a_node_that_holds_layers_stops_when_the_answer_is_whole(cluster: Cluster) -> None:
    asking = ask(cluster[0], 200)
    assert cluster[1].stop(60) == 0
    # It was there to the end: nothing had to be mended.
    assert asking.ended_exactly()["_routing"]["resumed"] == 0
    # One who asks now waits for it.
    late = Asking(cluster[0], 10)
    late.start()
    plan = {"model": "count"}
    until(lambda: b"waits for node1" in cluster[0].ask("POST", "/api/cluster/plan", plan).body, "it waits")
    cluster[1].start()
    late.ended_exactly()


def test_an_answer_waits_for_a_node_that_is_killed_and_started_again(cluster: Cluster) -> None:
    asking = ask(cluster[0], 300)
    cluster[1].kill()
    cluster[1].start()
    assert asking.ended_exactly()["_routing"]["resumed"] == 1


def test_an_answer_waits_for_the_only_node_with_the_file(cluster: Cluster) -> None:
    """Nobody else has the model's file: it can only go on when that node is back."""
    asking = ask(cluster[1], 400)
    cluster[0].kill()
    until(lambda: "waits for node0: it has the file" in cluster[1].log(), "the answer waits")
    cluster[0].start()
    assert asking.ended_exactly()["_routing"]["resumed"] == 1


@pytest.mark.parametrize("cluster", [{"serving.drain_limit": 1}], indirect=True)
def test_an_answer_outlives_a_restart_of_the_only_node_with_the_file(cluster: Cluster) -> None:
    asking = ask(cluster[1], 500)
    assert cluster[0].stop(60) == 0
    until(lambda: "waits for node0: it has the file" in cluster[1].log(), "the answer waits")
    cluster[0].start()
    assert asking.ended_exactly()["_routing"]["resumed"] == 1


def drain(cluster: Cluster, node: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sollold", "drain", "--node", cluster[0].url, *words, node]
    return subprocess.run(command, capture_output=True, text=True, timeout=90)


def test_a_drained_node_is_empty_when_the_command_returns(cluster: Cluster) -> None:
    asking = ask(cluster[0], 200)
    done = drain(cluster, "node1")
    assert done.returncode == 0, done.stderr
    assert "layers of count" in done.stderr and "node1 is drained" in done.stdout
    # The answer was whole before; nothing of it was mended.
    assert asking.ended_exactly()["_routing"]["resumed"] == 0
    node = next(one for one in cluster[0].state()["nodes"] if one["name"] == "node1")
    assert node["empty"] and node["granted"] == 0
    assert drain(cluster, "node1", "--undo").returncode == 0
    asking = Asking(cluster[0], 10)
    asking.start()
    asking.ended_exactly()


@pytest.mark.parametrize("cluster", [{"serving.drain_limit": 1}], indirect=True)
def test_a_node_that_is_taken_back_loses_nothing_at_the_limit_of_its_drain(cluster: Cluster) -> None:
    asking = ask(cluster[1], 500)
    for on in (True, False):
        reply = cluster[0].ask("POST", "/api/cluster/drain", {"node": "", "on": on})
        assert reply.status == 200
    undone = time.monotonic()
    assert asking.ended_exactly()["_routing"]["resumed"] == 0
    assert time.monotonic() - undone > 1


@pytest.mark.parametrize("program", ["rpc-server", "llama-server"])
@pytest.mark.parametrize("cluster", [{"serving.still": 4}], indirect=True)
def test_an_engine_that_is_stopped_is_left_long_before_a_slow_one_would_be(
    cluster: Cluster, program: str
) -> None:
    asking = ask(cluster[0], 250)
    (pid,) = [pid for node in cluster for pid in engines(node, program)]
    os.kill(pid, signal.SIGSTOP)
    stopped = time.monotonic()
    assert asking.ended_exactly()["_routing"]["resumed"] == 1
    assert "none of its processes used any CPU" in cluster[0].log()
    # The limit for a slow one is two minutes.
    assert time.monotonic() - stopped < 60
