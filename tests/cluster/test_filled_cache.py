"""Two real daemons that both have a model's file: a worker's large layers do not come through the head."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sollold.engines.install.find import Llama
from tests.daemons import Cluster, Node, until
from tests.gguf import writer
from tests.gguf.size import Size

pytestmark = [pytest.mark.cluster, pytest.mark.llama, pytest.mark.timeout(300)]

SAID = "were not loaded through the head"
ASK = {
    "model": "both",
    "messages": [{"role": "user", "content": "Hello."}],
    "stream": False,
    "options": {"num_predict": 12, "temperature": 0},
}


def holders(cluster: Cluster) -> set[int]:
    """How many nodes have the file, as each node knows."""
    lists = [node.ask("GET", "/api/tags").json["models"] for node in cluster]
    return {len(one["nodes"]) for models in lists for one in models if one["name"] == "both:latest"}


def answer(cluster: Cluster) -> str:
    reply = cluster[0].ask("POST", "/api/chat", ASK, timeout=240)
    assert reply.status == 200, reply.body
    return str(reply.json["message"]["content"])


def filled(cluster: Cluster) -> Node | None:
    return next((node for node in cluster if SAID in node.log()), None)


def test_a_worker_takes_its_layers_from_its_own_copy(tmp_path: Path, llama: Llama) -> None:
    size = writer.sized("llama", 0.2e9, Size(layers=4, embd=1024, heads=8, heads_kv=4, vocab=4096))
    settings = {"placement.context": 512, "placement.slots": 1, "placement.keep_alive": -1}
    with Cluster(2, tmp_path, llama, memory="190 MB", settings=settings) as cluster:
        file = writer.write(cluster[0].models / "both.gguf", "llama", size)
        os.link(file, cluster[1].models / "both.gguf")
        cluster.together()
        until(lambda: holders(cluster) == {2}, "both have it")
        from_its_copy = answer(cluster)
        worker = until(lambda: filled(cluster), "a worker's cache was filled")
        until(worker.tensors, "what it took is kept")
        done = cluster[0].ask("POST", "/api/cluster/unload", {"model": "both", "force": True}, timeout=60)
        assert done.status == 200, done.body
        until(lambda: not cluster.deployments(), "it is unloaded")
        # Once more without the copy and without the cache: through the head.
        for tensor in worker.tensors():
            tensor.unlink()
        (worker.models / "both.gguf").unlink()
        until(lambda: holders(cluster) == {1}, "one has it")
        assert answer(cluster) == from_its_copy
