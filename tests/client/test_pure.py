"""The parts of the client that do no I/O: which node is next, what was delivered, statistics, events."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from sollold.client.coordinator import coordinators_in
from sollold.client.events import Events
from sollold.client.node_list import MOST_NODES, NodeList
from sollold.client.received import Received
from sollold.client.stats import cluster_stats


def node(name: str, **more: Any) -> dict[str, Any]:
    facts = {"me": False, "build": "b1", "plain_workers": [], "addresses": [f"10.0.0.{name}"]}
    facts |= {"peer_port": 11436, "total": 1}
    return {"node": f"id{name}", "name": f"n{name}", "url": f"http://10.0.0.{name}:11435", **facts, **more}


def deployment(id: str = "d1", **more: Any) -> dict[str, Any]:
    parts = [
        ("id1", "CPU", 0, 3),
        ("id2", "CPU", 3, 7),
        ("id1", "10.0.0.9:50052", 7, 9),
        ("id3", "CPU", 9, 9),
    ]
    placed = [
        {"node": one, "node_name": f"n{one[2:]}", "device": device, "first": first, "last": last, "bytes": 5}
        for one, device, first, last in parts
    ]
    facts = {"backend": "llama.cpp-distributed", "state": "ready", "node": "id1", "node_name": "n1"}
    facts |= {"model": "big:latest", "context": 512, "speed": 2.5, "placed": placed}
    return {"id": id, **facts, **more}


def test_nodes_that_fail_come_last_until_they_answer_again() -> None:
    nodes = NodeList(["http://a", "http://b/"])
    assert [one.url for one in nodes.order()] == ["http://a", "http://b"]
    nodes.failed("http://a", 10.0)
    assert [one.url for one in nodes.order()] == ["http://b", "http://a"]
    assert nodes.due(10.5) == [] and [one.url for one in nodes.due(11.0)] == ["http://a"]
    nodes.failed("http://a", 11.0)
    assert nodes.due(12.5) == [], "each failure doubles the time"
    for _ in range(20):
        nodes.failed("http://a", 20.0)
    assert nodes.due(50.0), "but not without a limit"
    nodes.answered("http://a")
    assert [one.url for one in nodes.order()] == ["http://a", "http://b"]


def test_the_other_nodes_are_learned_from_one() -> None:
    nodes = NodeList(["http://localhost:11435"])
    nodes.learn("http://localhost:11435", {"nodes": [node("2"), node("1", me=True)]})
    assert [one.url for one in nodes] == ["http://localhost:11435", "http://10.0.0.2:11435"]
    assert [one.name for one in nodes] == ["n1", "n2"], "the asked one keeps the address that works"
    nodes.learn("http://10.0.0.2:11435", {"nodes": [node("2", me=True), node("1")]})
    assert len(nodes) == 2
    nodes.learn("http://10.0.0.2:11435", {"nodes": [node(str(number)) for number in range(3, 200)]})
    assert len(nodes) == MOST_NODES


def test_what_was_delivered_is_told_and_the_whole_is_counted() -> None:
    said = Received()
    body = {"model": "m", "stream": True}
    assert not said.add({"message": {"role": "assistant", "content": ""}, "done": False}, 1.0)
    assert said.request(body) == body
    assert said.add({"message": {"content": "", "thinking": "hm "}}, 2.0)
    assert said.add({"message": {"content": "one "}}, 3.0)
    said.backend = "llama.cpp-local"
    said.node_lost("n1", 4.0)
    assert said.request(body)["resume"] == {
        "content": "one ",
        "thinking": "hm ",
        "events": 2,
        "tool_calls": 0,
        "logprobs": False,
        "spent_ms": 2000.0,
        "backend": "llama.cpp-local",
    }
    assert said.add({"message": {"content": "two"}}, 5.5)
    last = {"message": {"content": ""}, "done": True, "total_duration": 1, "_routing": {"resumed": 1}}
    done = said.finish(last, 7.0)
    assert done["_routing"] == {"resumed": 2, "gap_ms": 1500.0, "duration_ms": 7000.0, "lost_nodes": ["n1"]}
    assert done["total_duration"] == 7_000_000_000
    assert said.whole(done)["message"] == {"content": "one two", "thinking": "hm "}
    said.forget()
    assert not said and said.request(body) == body


def test_records_of_generate_are_told_apart_from_those_of_chat() -> None:
    said = Received()
    assert said.add({"response": "a"}, 1.0) and said.add({"response": "b", "logprobs": [1]}, 1.0)
    assert said.request({})["resume"]["logprobs"] is True
    assert said.whole(said.finish({"response": "", "done": True}, 1.0)) == {
        "response": "ab",
        "done": True,
        "_routing": {},
        "logprobs": [1],
    }


def test_a_coordinator_tells_where_its_layers_are() -> None:
    cluster = {
        "nodes": [node("1"), node("2"), node("3")],
        "deployments": [deployment(), deployment("d2", backend="llama.cpp-local")],
    }
    asked: list[str] = []

    def look(id: str) -> bool:
        asked.append(id)
        return False

    (one,) = coordinators_in(cluster, look)
    assert one.base_url == "http://10.0.0.1:11435" and not one.is_running() and asked == ["d1"]
    assert [(two["host"], two["port"], two["layers"]) for two in one.rpc_backends] == [
        ("10.0.0.2", 11436, 4),
        ("10.0.0.9", 50052, 2),
    ]
    assert [(part["first"], part["last"]) for part in one.layers] == [(0, 2), (3, 6), (7, 8)]


def test_statistics_are_the_sums_over_the_nodes() -> None:
    counts = {"distributed_requests": 2, "ollama_requests": 1, "generated_tokens": 100}
    nodes = {
        "n1": {
            **counts,
            "generating_seconds": 10.0,
            "deployments": [{"id": "d1", "uptime_seconds": 7.5}, {"id": "old", "uptime_seconds": 90}],
        },
        "n2": {**counts, "generating_seconds": 10.0, "resumed_streams": 3, "deployments": []},
    }
    cluster = {"nodes": [node("1"), node("2")], "deployments": [deployment()]}
    stats = cluster_stats(cluster, nodes)
    assert stats["distributed_requests"] == 4 and stats["resumed_streams"] == 3
    assert stats["tokens_per_second"] == 10.0
    assert stats["coordinator_uptime_seconds"] == 7.5
    assert stats["active_rpc_backends"] == 2
    idle = cluster_stats({"nodes": [], "deployments": []}, {})
    assert (idle["tokens_per_second"], idle["coordinator_uptime_seconds"]) == (0.0, 0.0)


def test_the_log_tells_what_users_look_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sollold.client")
    events = Events()
    events.connected({"name": "n1", "nodes": [node("1", me=True)]}, True, False)
    assert "no RPC backends found" in caplog.text and "model sharding disabled" in caplog.text
    caplog.clear()
    events.connected({"name": "n1", "nodes": [node("1", me=True), node("2")]}, True, False)
    assert "no RPC backends" not in caplog.text
    request = events.request("big")
    request.waits("loading 10 %")
    request.waits("loading 20 %")
    assert caplog.text.count("starting llama.cpp coordinator for big") == 1
    routing = {"backend": "llama.cpp-distributed", "node": "n1", "devices": ["n1/CPU", "n2/CPU"]}
    request.ends(routing)
    events.request("big").ends(routing)
    assert caplog.text.count("coordinator started successfully: big on n1") == 1
    request.waits("recovering: a worker died")
    assert "coordinator process died" in caplog.text
