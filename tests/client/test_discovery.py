"""A program on a machine without a daemon finds the cluster by mDNS."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from sollold.engines.install.find import Llama
from tests import netns
from tests.client.conftest import MEMORY, SETTINGS, SMALL, give_models
from tests.daemons import Cluster

PROGRAM = f"""
from sollold.client.sync_wrapper import HybridRouter
router = HybridRouter()
answer = router.route_request("{SMALL}", [{{"role": "user", "content": "count"}}], max_tokens=2)
print(answer["message"]["content"], answer["_routing"]["node"])
unfinished = router.route_request("{SMALL}", [{{"role": "user", "content": "count"}}], stream=True)
print(next(unfinished)["message"]["content"])
"""


@pytest.mark.cluster
@pytest.mark.llama
def test_nodes_are_found_on_the_lan(tmp_path: Path, llama: Llama, model_files: Path) -> None:
    if why := netns.available():
        pytest.skip(why)
    with Cluster(3, tmp_path, llama, memory=MEMORY, settings=SETTINGS, start=False) as cluster:
        give_models(cluster, model_files)
        for node in cluster.nodes[:2]:
            node.start()
        cluster.together()
        machine = cluster[2].machine
        assert machine is not None
        environment = {key: value for key, value in os.environ.items() if key != "SOLLOLD_NODE_URL"}
        done = machine.run([sys.executable, "-c", PROGRAM], timeout=90, env=environment, check=False)
        first, second = done.stdout.splitlines()
        assert first.startswith("w0001 w0002") and first.endswith(("node0", "node1"))
        assert second.strip() == "w0001"
        assert done.returncode == 0 and not done.stderr, "an unfinished stream ends quietly"
