"""Real daemons on separate machines found a cluster by themselves and admit others."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sollold.engines.install.find import Llama
from tests.daemons import Cluster, Node, until

pytestmark = [pytest.mark.cluster, pytest.mark.llama, pytest.mark.patient, pytest.mark.timeout(300)]


def sollold(node: Node, *words: str) -> str:
    """Run a command on the machine of ``node`` and return its output."""
    with node.network():
        done = subprocess.run(
            [sys.executable, "-m", "sollold", *words, "--node", node.url],
            capture_output=True, text=True, timeout=60, env={**os.environ, "SOLLOLD_CONFIG": os.devnull},
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def names(node: Node) -> set[str]:
    return set(node.sees())


def own_values(node: Node, key: str) -> list[str]:
    """Return the non-empty values of ``key`` in the node's record of itself."""
    return [record[key] for record in node.state().get("nodes", []) if record["me"] and record[key]]


def test_a_machine_without_multicast_joins_by_a_code(folder: Path, llama: Llama) -> None:
    settings = {"cluster.door": "closed", "cluster.mdns": "off"}
    with Cluster(2, folder, llama, settings=settings) as cluster:
        invites, joins = cluster.nodes
        until(lambda: all(names(node) == {node.name} for node in cluster), "each is alone")
        command = sollold(invites, "invite").splitlines()[-1].split()
        code = command[2]
        assert command[-1] == invites.address
        assert f"{invites.name} has an invitation open until" in sollold(invites, "status")
        wrong = {"code": f"{(int(code.replace('-', '')) + 1) % 10**8:08d}", "seed": invites.address}
        refused = joins.ask("POST", "/api/cluster/join", wrong)
        assert refused.status == 400 and "2 tries are left" in refused.json["error"]
        assert sollold(joins, *command[1:]) == f"joined the cluster of {invites.name}\n"
        until(lambda: all(len(names(node)) == 2 for node in cluster), "they are one", timeout=20)
        assert "tried a wrong code, 2 tries left" in invites.log()


def test_machines_found_a_cluster_close_admission_and_admit_one_more(folder: Path, llama: Llama) -> None:
    with Cluster(4, folder, llama, settings={"cluster.door": "1h"}, start=False) as cluster:
        first, late = cluster.nodes[:3], cluster[3]
        for node in first:
            node.start()
        founders = {node.name for node in first}
        until(lambda: all(names(node) == founders for node in first), "the three form a cluster")
        assert "admitted by" in sollold(first[0], "cluster", "members")
        sollold(first[1], "cluster", "close")
        late.start()
        seeking = until(lambda: own_values(late, "seeking"), "the fourth waits")[0]
        waits = until(
            lambda: [
                machine
                for node in first[0].state()["nodes"]
                for machine in node["waiting"]
                if machine["name"] == late.name
            ],
            "the others show it",
        )
        assert waits[0]["code"] in seeking
        for node in (first[0], late):
            assert waits[0]["code"] in sollold(node, "status")
        assert names(late) == {late.name} and names(first[0]) == founders
        # A stranger on the LAN can't admit itself over HTTP.
        with late.network():
            body = f'{{"machine": "{late.name}"}}'
            words = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "-d", body]
            words += ["-H", "Content-Type: application/json", f"{first[0].url}/api/cluster/admit"]
            asked = subprocess.run(words, capture_output=True, text=True, timeout=30)
        assert asked.stdout == "401"
        began = time.monotonic()
        assert "joins" in sollold(first[2], "admit", late.name)
        until(lambda: names(late) == founders | {late.name}, "it is admitted", timeout=20)
        assert time.monotonic() - began < 15
        # After a restart, all return without new admission.
        for node in cluster:
            node.stop()
        for node in cluster:
            node.start()
        until(
            lambda: all(names(node) == founders | {late.name} for node in cluster),
            "all are back",
        )
