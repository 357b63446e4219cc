"""Two real daemons: one has the model's file, the other has the memory, fetches the file and runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sollold.engines.install.find import Llama
from tests.daemons import Cluster, until
from tests.gguf import writer
from tests.gguf.size import Size

pytestmark = [pytest.mark.cluster, pytest.mark.llama, pytest.mark.timeout(300)]


def test_the_node_with_enough_memory_fetches_the_file_and_answers(tmp_path: Path, llama: Llama) -> None:
    size = writer.sized("llama", 0.2e9, Size(layers=8, embd=512, heads=8, heads_kv=4, vocab=4096))
    settings = {"placement.context": 512, "placement.slots": 1, "placement.enable_distributed": "off"}
    each = [{"node.memory_limit": "150 MB"}, {"node.memory_limit": "800 MB"}]
    with Cluster(2, tmp_path, llama, settings=settings, each=each) as cluster:
        source = writer.write(cluster[0].models / "moved.gguf", "llama", size)
        cluster.together()
        until(lambda: b"moved" in cluster[0].ask("GET", "/api/tags").body, "the model is listed")
        plan = cluster[0].ask("POST", "/api/cluster/plan", {"model": "moved"}).json
        assert "node1 fetches the file of moved:latest first" in plan["reason"]
        assert not list(cluster[1].folder.rglob("*.gguf")), "a plan transfers no file"
        body = {
            "model": "moved",
            "messages": [{"role": "user", "content": "Hello."}],
            "stream": False,
            "options": {"num_predict": 4},
        }
        reply = cluster[0].ask("POST", "/api/chat", body, timeout=240)
        assert reply.status == 200, reply.body
        assert reply.json["_routing"]["node"] == "node1"
        (fetched,) = (cluster[1].folder / "state" / "models").glob("*/*.gguf")
        assert fetched.read_bytes() == source.read_bytes()
