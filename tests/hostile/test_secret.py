"""Real daemons change their secret and evict a member while answers run."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sollold.engines.install.find import Llama
from sollold.models.gguf.demo_model import write
from tests import netns
from tests.chaos.callers import DIALECTS, Caller
from tests.chaos.round import MEMORY, RECITAL, SETTINGS
from tests.daemons import PEER, Cluster, Node, until
from tests.hostile.test_door import names, own_values, sollold

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.patient,
    pytest.mark.llama,
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(netns.available()), reason=netns.available()),
]


@pytest.fixture
def three(tmp_path: Path, llama: Llama) -> Iterator[Cluster]:
    """Three machines that form a cluster, with a model that needs two of them."""
    model = tmp_path / "count.gguf"
    write(model, RECITAL)
    settings = SETTINGS | {"cluster.door": "1h"}
    with Cluster(3, tmp_path, llama, memory=MEMORY, settings=settings, start=False) as cluster:
        for node in cluster:
            (node.models / "count.gguf").symlink_to(model)
            node.start()
        cluster.together()
        yield cluster


def ring(node: Node) -> dict[str, Any]:
    """Return the node's keyring on disk."""
    return dict(json.loads((node.folder / "state" / "keyring").read_bytes()))


def connected(node: Node, other: Node) -> list[str]:
    """Return the peer connections between two machines."""
    with node.network():
        words = ["ss", "-Htn", "state", "established", f"( dport = {PEER} or sport = {PEER} )"]
        listed = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout
    return [
        line for line in listed.splitlines() if f"{other.address}]:" in line or f"{other.address}:" in line
    ]


def holder(cluster: Cluster) -> Node:
    """Return a node that holds layers of another node's deployment."""
    (found,) = [
        deployment
        for deployment in cluster[0].state()["deployments"]
        if deployment["model"].startswith("count")
    ]
    named = {placed["node_name"] for placed in found["placed"]} - {found["node_name"]}
    return next(node for node in cluster if node.name in named)


def test_changing_the_secret_and_evicting_a_node_while_answers_run(three: Cluster) -> None:
    callers = {node.name: Caller(node, DIALECTS[0], "count", (140, 160), node.index) for node in three}
    for caller in callers.values():
        caller.start()

    def all_streaming(after: float = 0.0) -> bool:
        return all(caller.last_word() > after for caller in callers.values())

    until(all_streaming, "all streams run", 120)
    # All get a new secret; no answer is interrupted or resumed.
    before = ring(three[0])["secret"]
    assert "new secret on node0, node1, node2" in sollold(three[1], "cluster", "rotate")
    until(lambda: len({before, *(ring(node)["secret"] for node in three)}) == 2, "it is on disk everywhere")
    rotated = time.monotonic()
    until(lambda: all_streaming(rotated), "all streams continue", 60)
    # A node with layers is evicted: its connections end immediately and the others' answers continue.
    out = holder(three)
    stay = [node for node in three if node is not out]
    callers[out.name].stop()
    began = time.monotonic()
    with ThreadPoolExecutor(1) as thread:
        order = thread.submit(stay[0].ask, "POST", "/api/cluster/evict", {"machine": out.name})
        until(lambda: all(out.name not in names(node) for node in stay), "the node is evicted", 20, 0.02)
        until(lambda: not any(connected(node, out) for node in stay), "its connections are closed", 20, 0.02)
        took = time.monotonic() - began
        answer = order.result()
    assert answer.status == 200 and set(answer.json["done"]) == {node.name for node in stay}
    print(f"evicted after {took:.2f} s")
    for caller in callers.values():
        caller.stop()
    for caller in callers.values():
        caller.join(220)
        assert not caller.is_alive()
    for node in stay:
        for stream in callers[node.name].streams:
            assert stream.done and not stream.what_is_wrong(), (stream.what_is_wrong(), stream.error)
            assert not stream.resumed or stream.ended > began
    # Takes some hundredths of a second on an idle machine.
    assert took < 4.0
    # It knows the reason, its key is shown, and the open admission does not apply to it.
    until(lambda: "was evicted" in "".join(own_values(out, "seeking")), "the node knows the reason", 30)
    assert f"{out.name}, which was evicted, waits" in sollold(stay[1], "status")
    assert names(out) == {out.name} and ring(out)["secret"] not in {ring(node)["secret"] for node in stay}
    # An admin admits it. It is offline during the next change of the secret and fetches it later by its key.
    assert stay[0].ask("POST", "/api/cluster/admit", {"machine": out.name}).status == 200
    until(lambda: all(len(names(node)) == 3 for node in three), "the node has rejoined")
    out.stop()
    until(lambda: all(out.name not in names(node) for node in stay), "the node is offline", 20)
    assert stay[1].ask("POST", "/api/cluster/rotate", {}).json["away"] == [out.name]
    out.start()
    until(lambda: all(len(names(node)) == 3 for node in three), "the node is online again")
    until(lambda: len({ring(node)["secret"] for node in three}) == 1, "all nodes have the new secret")
