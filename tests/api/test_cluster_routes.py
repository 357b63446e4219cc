"""``/api/cluster``: the state of the cluster, and commands."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from aiohttp import ClientSession

from sollold.api.cluster.views import node_object
from sollold.control.cluster import Planned
from sollold.errors import Fault, Refusal
from sollold.leader.messages import Ensure
from sollold.machine.device import Device, Kind
from sollold.settings.schema import GIB, MOST_SLOTS
from tests.api.api_parts import (
    CHAT,
    PlainCluster,
    ScriptedService,
    chunk,
    endpoint,
    parts,
    record,
)
from tests.api.conftest import Serve


async def test_cluster_state(serve: Serve, http: ClientSession) -> None:
    cluster = PlainCluster(record(), record("1" * 16, "beta", endpoints=(endpoint(id="o", loaded=False),)))
    service = ScriptedService(chunk("a"), asyncio.Event())
    url = await serve(parts(service, cluster=cluster))
    async with http.post(f"{url}/api/chat", json=CHAT) as answer:
        await answer.content.readline()
        async with http.get(f"{url}/api/cluster") as response:
            state = await response.json()
    assert state["open"] is True and state["term"] == 3 and state["leader_name"] == "alpha"
    assert [node["name"] for node in state["nodes"]] == ["alpha", "beta"]
    assert state["nodes"][0]["leader"] and state["nodes"][0]["devices"][0]["granted"] == 100
    (deployment,) = state["deployments"]
    assert [(share["node_name"], share["first"], share["last"]) for share in deployment["placed"]] == [
        ("alpha", 0, 2),
        ("beta", 2, 5),
    ]
    (live,) = state["requests"]
    assert (live["model"], live["stage"], live["node"], live["events"]) == ("demo", "answering", "beta", 1)


async def test_route_answers_for_a_model_that_no_node_has_but_that_can_be_planned(
    serve: Serve, http: ClientSession
) -> None:
    class PlanningCluster(PlainCluster):
        async def plan(
            self, ask: Ensure, *, online: bool = False, permit: Callable[[], None] = lambda: None
        ) -> Planned:
            if ask.model != "big:1t":
                raise Refusal(Fault.NOT_FOUND, f"model {ask.model!r} not found")
            return Planned(True, "it would be spread")

    url = await serve(parts(cluster=PlanningCluster()))
    async with http.post(f"{url}/api/cluster/route", json={"model": "big:1t"}) as answer:
        assert await answer.json() == {"model": "big:1t", "nodes": [], "endpoints": []}
    async with http.post(f"{url}/api/cluster/route", json={"model": "nowhere"}) as answer:
        assert answer.status == 404


async def test_cluster_commands(serve: Serve, http: ClientSession) -> None:
    cluster = PlainCluster()
    url = await serve(parts(cluster=cluster))
    async with http.post(
        f"{url}/api/cluster/plan", json={"model": "demo", "context": 4096, "kv": "Q8_0", "policy": "Even"}
    ) as answer:
        assert (await answer.json())["ok"] is True
    assert (cluster.asked[-1].context, cluster.asked[-1].type_k, cluster.asked[-1].type_v) == (
        4096,
        "q8_0",
        "q8_0",
    )
    assert cluster.asked[-1].placement.policy == "even"
    async with http.post(f"{url}/api/cluster/load", json={"model": "demo", "keep_alive": "-1"}) as answer:
        assert (await answer.json())["deployment"] == "d1"
    assert cluster.asked[-1].keep_alive == -1
    async with http.post(f"{url}/api/cluster/unload", json={"model": "demo", "force": True}) as answer:
        assert await answer.json() == {"unloaded": 1, "forgotten": True}
    async with http.post(f"{url}/api/cluster/drain", json={"on": False}) as answer:
        assert (await answer.json())["draining"] is False
    assert cluster.asked[-2:] == [("unload", "demo", True), ("drain", "", False)]
    # With an unknown field the default node must not be drained.
    async with http.post(f"{url}/api/cluster/drain", json={"nod": "beta"}) as answer:
        assert answer.status == 400
        assert (await answer.json())["error"] == "invalid request: unknown field nod; did you mean node?"
    assert cluster.asked[-1] == ("drain", "", False)
    async with http.post(f"{url}/api/cluster/scan") as answer:
        (worker,) = (await answer.json())["workers"]
    assert (worker["address"], worker["state"], worker["named"]) == ("10.0.0.9:50052", "usable", False)
    async with http.post(f"{url}/api/cluster/route", json={"model": "demo"}) as answer:
        assert (await answer.json())["endpoints"][0]["why"] == "ready, nothing in line"
    for wrong in ({"policy": "odd"}, {"slots": MOST_SLOTS + 1}):
        async with http.post(f"{url}/api/cluster/plan", json={"model": "demo", **wrong}) as answer:
            assert answer.status == 400
            assert next(iter(wrong)) in (await answer.json())["error"]


def test_shared_memory_is_counted_once_per_node() -> None:
    gpu = Device("Vulkan0", Kind.GPU, "Iris", 8 * GIB, 6 * GIB, 8 * GIB, 2 * GIB, 5 * GIB, pool="ram")
    ram = replace(gpu, id="CPU", kind=Kind.CPU, granted=GIB)
    card = Device("CUDA0", Kind.GPU, "RTX", 4 * GIB, 4 * GIB, 4 * GIB, 0, 4 * GIB)
    node = node_object(replace(record(), devices=(gpu, ram, card)), "", "")
    assert (node["total"], node["granted"], node["available"]) == (12 * GIB, 3 * GIB, 9 * GIB)
