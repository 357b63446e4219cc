"""Two real daemons and an external worker: one node is configured with it, the other is the head."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from sollold.engines.install.find import Llama
from tests.daemons import Cluster, Node, until
from tests.external_worker import address_of, begun
from tests.gguf import writer
from tests.gguf.size import Size

pytestmark = [pytest.mark.cluster, pytest.mark.llama, pytest.mark.timeout(300)]

BODY = {
    "model": "wide",
    "messages": [{"role": "user", "content": "Hello."}],
    "stream": False,
    "options": {"num_predict": 6, "temperature": 0, "seed": 1},
}


@pytest.fixture
def worker(tmp_path: Path, llama: Llama) -> Iterator[str]:
    process = begun(llama, tmp_path)
    try:
        yield until(lambda: address_of(process), "the worker listens")
    finally:
        process.kill()
        process.wait()


def lists_wide(node: Node) -> bool:
    return b"wide" in node.ask("GET", "/api/tags").body


def test_a_model_runs_on_an_external_worker_of_another_node(
    tmp_path: Path, llama: Llama, worker: str
) -> None:
    size = writer.sized("llama", 0.2e9, Size(layers=8, embd=512, heads=8, heads_kv=4, vocab=4096))
    settings = {"placement.context": 512, "placement.slots": 1}
    each = [
        {"node.memory_limit": "1 MB", "llama.rpc_backends": worker, "llama.allow_plain_workers": "on"},
        {"node.memory_limit": "150 MB"},
    ]
    with Cluster(2, tmp_path, llama, settings=settings, each=each, loopback=True) as cluster:
        writer.write(cluster[1].models / "wide.gguf", "llama", size)
        cluster.together()
        for node in cluster:
            until(partial(lists_wide, node), "the model is listed")

        def worker_states() -> list[str]:
            nodes = cluster[1].state()["nodes"]
            return [worker["state"] for node in nodes for worker in node["plain_workers"]]

        until(lambda: worker_states() == ["usable"], "the other node sees the worker")
        reply = cluster[0].ask("POST", "/api/chat", BODY, timeout=240)
        assert reply.status == 200, reply.body
        assert reply.json["eval_count"] == 6
        (running,) = cluster.deployments()
        assert running["backend"] == "llama.cpp-distributed" and running["node_name"] == "node1"
        assert ("node0", worker) in [(share["node_name"], share["device"]) for share in running["placed"]]
        until(lambda: worker_states() == ["taken"], "the worker is in use")
        words = [sys.executable, "-m", "sollold", "status", "--node", cluster[1].url]
        shown = subprocess.run(words, capture_output=True, text=True, timeout=60).stdout
        assert f"{worker} (external)" in shown and "neither authenticated nor encrypted" in shown
        findings = cluster[0].ask("GET", "/api/doctor").json["findings"]
        assert any("external workers are used" in finding["what"] for finding in findings)
        assert cluster[0].ask("POST", "/api/cluster/unload", {"model": "wide"}).status == 200
        until(lambda: worker_states() == ["usable"], "the worker is checked and offered again")
