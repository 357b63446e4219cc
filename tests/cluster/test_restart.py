"""A node of a distributed model is restarted, drained or suspended during a response."""

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
    """Two nodes that the model needs both; only the first has its file."""
    settings = SETTINGS | getattr(request, "param", {})
    with Cluster(2, tmp_path, llama, memory="125 MiB", settings=settings, loopback=True) as cluster:
        write(cluster[0].models / "count.gguf", RECITAL)
        cluster.together()
        until(lambda: b"count" in cluster[0].ask("GET", "/api/tags").body, "the model is listed")
        yield cluster


class StreamedRequest(threading.Thread):
    """A thread that reads one streamed response."""

    def __init__(self, node: Node, words: int) -> None:
        super().__init__(daemon=True)
        self.node = node
        self.words = words
        self.text = ""
        self.lines: list[dict[str, Any]] = []

    def run(self) -> None:
        options = {"temperature": 0, "num_predict": self.words}
        body = {"model": "count", "prompt": "count", "stream": True, "options": options}
        with self.node.open("POST", "/api/generate", body, timeout=120) as response:
            for line in response:
                self.lines.append(json.loads(line))
                self.text += self.lines[-1].get("response", "")

    def has_begun(self) -> bool:
        return self.text.count(" ") >= 5

    def complete(self) -> dict[str, Any]:
        """Wait for the end of the response, check its words and return its last line."""
        self.join(120)
        assert not self.is_alive(), f"{self.text[-40:]!r}"
        assert self.text.split() == [f"w{number:04d}" for number in range(1, self.words + 1)], self.lines[-1]
        return self.lines[-1]


def ask(node: Node, words: int) -> StreamedRequest:
    stream = StreamedRequest(node, words)
    stream.start()
    until(stream.has_begun, "the response has begun")
    return stream


def test_a_worker_stops_only_when_the_response_is_complete(cluster: Cluster) -> None:
    stream = ask(cluster[0], 200)
    assert cluster[1].stop(60) == 0
    # It stayed to the end, so nothing was resumed.
    assert stream.complete()["_routing"]["resumed"] == 0
    # A request now waits for it.
    late = StreamedRequest(cluster[0], 10)
    late.start()
    plan = {"model": "count"}
    until(
        lambda: b"waits for node1" in cluster[0].ask("POST", "/api/cluster/plan", plan).body,
        "the request waits",
    )
    cluster[1].start()
    late.complete()


def test_a_response_waits_for_a_killed_node_to_restart(cluster: Cluster) -> None:
    stream = ask(cluster[0], 300)
    cluster[1].kill()
    cluster[1].start()
    assert stream.complete()["_routing"]["resumed"] == 1


def test_a_response_waits_for_the_only_node_with_the_file(cluster: Cluster) -> None:
    stream = ask(cluster[1], 400)
    cluster[0].kill()
    until(lambda: "waits for node0: it has the file" in cluster[1].log(), "the response waits")
    cluster[0].start()
    assert stream.complete()["_routing"]["resumed"] == 1


@pytest.mark.parametrize("cluster", [{"serving.drain_limit": 1}], indirect=True)
def test_a_response_survives_a_restart_of_the_only_node_with_the_file(cluster: Cluster) -> None:
    stream = ask(cluster[1], 500)
    assert cluster[0].stop(60) == 0
    until(lambda: "waits for node0: it has the file" in cluster[1].log(), "the response waits")
    cluster[0].start()
    assert stream.complete()["_routing"]["resumed"] == 1


def drain(cluster: Cluster, node: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sollold", "drain", "--node", cluster[0].url, *words, node]
    return subprocess.run(command, capture_output=True, text=True, timeout=90)


def test_a_drained_node_is_empty_when_the_command_returns(cluster: Cluster) -> None:
    stream = ask(cluster[0], 200)
    done = drain(cluster, "node1")
    assert done.returncode == 0, done.stderr
    assert "layers of count" in done.stderr and "node1 is drained" in done.stdout
    # The response was complete before; nothing was resumed.
    assert stream.complete()["_routing"]["resumed"] == 0
    node = next(node for node in cluster[0].state()["nodes"] if node["name"] == "node1")
    assert node["empty"] and node["granted"] == 0
    assert drain(cluster, "node1", "--undo").returncode == 0
    stream = StreamedRequest(cluster[0], 10)
    stream.start()
    stream.complete()


@pytest.mark.parametrize("cluster", [{"serving.drain_limit": 1}], indirect=True)
def test_an_undone_drain_does_not_end_responses_at_its_limit(cluster: Cluster) -> None:
    stream = ask(cluster[1], 500)
    for on in (True, False):
        reply = cluster[0].ask("POST", "/api/cluster/drain", {"node": "", "on": on})
        assert reply.status == 200
    undone = time.monotonic()
    assert stream.complete()["_routing"]["resumed"] == 0
    assert time.monotonic() - undone > 1


@pytest.mark.parametrize("program", ["rpc-server", "llama-server"])
@pytest.mark.parametrize("cluster", [{"serving.still": 4}], indirect=True)
def test_a_suspended_engine_is_abandoned_sooner_than_a_slow_one(cluster: Cluster, program: str) -> None:
    stream = ask(cluster[0], 250)
    (pid,) = [pid for node in cluster for pid in engines(node, program)]
    os.kill(pid, signal.SIGSTOP)
    stopped = time.monotonic()
    assert stream.complete()["_routing"]["resumed"] == 1
    assert "none of its processes used any CPU" in cluster[0].log()
    # The limit for a slow engine is two minutes.
    assert time.monotonic() - stopped < 60
