"""Two real daemons with the same model file: the worker reads its large tensors from its own copy."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sollold.engines.install.find import Llama
from tests.daemons import Cluster, Node, until
from tests.gguf import writer
from tests.gguf.size import Size

pytestmark = [pytest.mark.cluster, pytest.mark.llama, pytest.mark.timeout(300)]

FILLED_MESSAGE = "were not loaded through the head"
REQUEST = {
    "model": "both",
    "messages": [{"role": "user", "content": "Hello."}],
    "stream": False,
    "options": {"num_predict": 12, "temperature": 0},
}


def holders(cluster: Cluster) -> set[int]:
    """The number of nodes that have the file, according to each node."""
    tags = [node.ask("GET", "/api/tags").json["models"] for node in cluster]
    return {len(model["nodes"]) for models in tags for model in models if model["name"] == "both:latest"}


def answer(cluster: Cluster) -> str:
    reply = cluster[0].ask("POST", "/api/chat", REQUEST, timeout=240)
    assert reply.status == 200, reply.body
    return str(reply.json["message"]["content"])


def node_with_filled_cache(cluster: Cluster) -> Node | None:
    return next((node for node in cluster if FILLED_MESSAGE in node.log()), None)


def test_a_worker_takes_its_layers_from_its_own_copy(tmp_path: Path, llama: Llama) -> None:
    size = writer.sized("llama", 0.2e9, Size(layers=4, embd=1024, heads=8, heads_kv=4, vocab=4096))
    settings = {"placement.context": 512, "placement.slots": 1, "placement.keep_alive": -1}
    with Cluster(2, tmp_path, llama, memory="190 MB", settings=settings) as cluster:
        file = writer.write(cluster[0].models / "both.gguf", "llama", size)
        os.link(file, cluster[1].models / "both.gguf")
        cluster.together()
        until(lambda: holders(cluster) == {2}, "both nodes have the file")
        from_own_copy = answer(cluster)
        worker = until(lambda: node_with_filled_cache(cluster), "a worker filled its cache from its own file")
        until(worker.tensors, "the tensors are in the worker's cache")
        done = cluster[0].ask("POST", "/api/cluster/unload", {"model": "both", "force": True}, timeout=60)
        assert done.status == 200, done.body
        until(lambda: not cluster.deployments(), "the model is unloaded")
        # Again without the copy and the cache: the tensors come from the head.
        for tensor in worker.tensors():
            tensor.unlink()
        (worker.models / "both.gguf").unlink()
        until(lambda: holders(cluster) == {1}, "only one node has the file")
        assert answer(cluster) == from_own_copy
