"""Attempts of a stranger on three real daemons with closed admission while a stream runs.

``SOLLOLD_TEST_TRIES`` sets their number, for example 1000.
"""

from __future__ import annotations

import http.client
import os
import random
from collections import Counter
from pathlib import Path

import pytest

from sollold.engines.install.find import Llama
from sollold.models.gguf.demo_model import Recital, counting, write
from tests.chaos.callers import DIALECTS, Caller
from tests.chaos.round import OWN_FAULTS
from tests.daemons import Cluster, Node, until
from tests.hostile.stranger import Stranger, try_all
from tests.hostile.sweep import InNetwork
from tests.hostile.test_door import sollold

pytestmark = [pytest.mark.cluster, pytest.mark.llama, pytest.mark.patient, pytest.mark.timeout(600)]

TRIES = int(os.environ.get("SOLLOLD_TEST_TRIES", "90"))
MODEL = "count"
ORDERS = ("load", "unload", "drain", "scan", "forget", "admit", "door", "keys")


def membership(nodes: list[Node]) -> list[tuple[list[str], object, object]]:
    """Return the members, leader and term as each node sees them."""
    states = [node.state() for node in nodes]
    return [
        (sorted(member["node"] for member in state["nodes"]), state["leader"], state["term"])
        for state in states
    ]


def test_a_stranger_learns_and_changes_nothing(folder: Path, llama: Llama) -> None:
    settings = {"cluster.door": "1h", "placement.context": 1024}
    with Cluster(4, folder, llama, settings=settings, start=False) as cluster:
        members, outside = cluster.nodes[:3], cluster[3]
        write(members[0].models / "count.gguf", Recital(counting(320), name=MODEL))
        for node in members:
            node.start()
        until(lambda: all(len(node.sees()) == 3 for node in members), "the three form a cluster")
        sollold(members[0], "cluster", "close")
        until(lambda: MODEL in members[1].ask("GET", "/api/tags").body.decode(), "the model is known")
        cluster.together()
        before = membership(members)
        callers = [Caller(node, DIALECTS[0], MODEL, (60, 200), 1) for node in members[:2]]
        for caller in callers:
            caller.start()
        try:
            ids = tuple(before[0][0])
            strangers = [
                Stranger(node.address, node.peer, ids, random.Random(node.index)) for node in members
            ]
            leaks = InNetwork(outside.network(), lambda: try_all(strangers, TRIES, 8)).finish()
            assert not leaks
            assert sum((stranger.tried for stranger in strangers), Counter()).total() == TRIES
            with outside.network():
                for order in ORDERS:
                    status = outside_status(members[0], f"/api/cluster/{order}")
                    assert status == 401, order
        finally:
            for caller in callers:
                caller.stop()
            for caller in callers:
                caller.join(60)
        streams = [stream for caller in callers for stream in caller.streams]
        assert len(streams) > 3
        assert [stream.error or stream.what_is_wrong() for stream in streams] == [""] * len(streams)
        # Members and leader are unchanged, and few machines wait for admission.
        assert membership(members) == before
        for node in members:
            waiting = [machine for member in node.state()["nodes"] for machine in member["waiting"]]
            assert len(waiting) <= 100
            assert not [line for line in node.log().splitlines() if any(word in line for word in OWN_FAULTS)]


def outside_status(node: Node, path: str) -> int:
    """Return the status of a POST; to be called in the network namespace of a non-member."""
    connection = http.client.HTTPConnection(node.address, node.http, timeout=20)
    try:
        connection.request("POST", path, b'{"model": "count"}', {"Content-Type": "application/json"})
        return connection.getresponse().status
    finally:
        connection.close()
