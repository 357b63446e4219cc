"""The parts of the client without I/O: node order, delivered text, statistics, events."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest

from sollold.client.coordinator import coordinators_in
from sollold.client.errors import ClientError
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
        {
            "node": number,
            "node_name": f"n{number[2:]}",
            "device": device,
            "first": first,
            "last": last,
            "bytes": 5,
        }
        for number, device, first, last in parts
    ]
    facts: dict[str, Any] = {
        "backend": "llama.cpp-distributed",
        "state": "ready",
        "node": "id1",
        "node_name": "n1",
    }
    facts |= {"model": "big:latest", "context": 512, "speed": 2.5, "placed": placed}
    return {"id": id, **facts, **more}


def test_failed_nodes_come_last_until_they_answer() -> None:
    nodes = NodeList(["http://a", "http://b/"])
    assert [known.url for known in nodes.order()] == ["http://a", "http://b"]
    nodes.failed("http://a", 10.0)
    assert [known.url for known in nodes.order()] == ["http://b", "http://a"]
    assert nodes.due(10.5) == [] and [known.url for known in nodes.due(11.0)] == ["http://a"]
    nodes.failed("http://a", 11.0)
    assert nodes.due(12.5) == [], "each failure doubles the delay"
    for _ in range(20):
        nodes.failed("http://a", 20.0)
    assert nodes.due(50.0), "the delay is limited"
    for _ in range(2000):
        nodes.failed("http://a", 60.0)
    assert nodes.due(90.0), "also of a node that is away for a day"
    nodes.answered("http://a")
    assert [known.url for known in nodes.order()] == ["http://a", "http://b"]


def test_other_nodes_are_learned_from_one_node() -> None:
    nodes = NodeList(["http://localhost:11435"])
    nodes.learn("http://localhost:11435", {"nodes": [node("2"), node("1", me=True)]})
    assert [known.url for known in nodes] == ["http://localhost:11435", "http://10.0.0.2:11435"]
    assert [known.name for known in nodes] == ["n1", "n2"], "the queried node keeps the address that works"
    nodes.learn("http://10.0.0.2:11435", {"nodes": [node("2", me=True), node("1")]})
    assert len(nodes) == 2
    nodes.learn("http://10.0.0.2:11435", {"nodes": [node(str(number)) for number in range(3, 300)]})
    assert len(nodes) == MOST_NODES


def test_a_failed_node_is_tried_at_its_new_address() -> None:
    nodes = NodeList(["http://a"])
    nodes.learn("http://a", {"nodes": [node("1", me=True), node("2")]})
    nodes.learn("http://a", {"nodes": [node("1", me=True), {**node("2"), "url": "http://10.0.0.9:11435"}]})
    assert [known.url for known in nodes] == ["http://a", "http://10.0.0.2:11435"], "the known one works"
    nodes.failed("http://10.0.0.2:11435", 1.0)
    for _ in range(2):
        listed = [node("1", me=True), {**node("2"), "url": "http://10.0.0.9:11435"}]
        nodes.learn("http://a", {"nodes": listed})
        assert [known.url for known in nodes.order()] == [
            "http://a",
            "http://10.0.0.9:11435",
            "http://10.0.0.2:11435",
        ]


def test_a_resumed_request_carries_the_delivered_text() -> None:
    received = Received()
    body = {"model": "m", "stream": True}
    assert not received.add({"message": {"role": "assistant", "content": ""}, "done": False}, 1.0)
    assert received.request(body) == body
    assert received.add({"message": {"content": "", "thinking": "hm "}}, 2.0)
    assert received.add({"message": {"content": "one "}}, 3.0)
    received.backend = "llama.cpp-local"
    received.node_lost("n1", 4.0)
    assert received.request(body)["resume"] == {
        "content": "one ",
        "thinking": "hm ",
        "events": 2,
        "tool_calls": 0,
        "logprobs": False,
        "spent_ms": 2000.0,
        "backend": "llama.cpp-local",
    }
    assert received.add({"message": {"content": "two"}}, 5.5)
    last = {"message": {"content": ""}, "done": True, "total_duration": 1, "_routing": {"resumed": 1}}
    done = received.finish(last, 7.0)
    assert done["_routing"] == {"resumed": 2, "gap_ms": 1500.0, "duration_ms": 7000.0, "lost_nodes": ["n1"]}
    assert done["total_duration"] == 7_000_000_000
    assert received.whole(done)["message"] == {"content": "one two", "thinking": "hm "}
    received.forget()
    assert not received and received.request(body) == body


def test_records_of_generate_are_recognized() -> None:
    received = Received()
    assert received.add({"response": "a"}, 1.0) and received.add({"response": "b", "logprobs": [1]}, 1.0)
    assert received.request({})["resume"]["logprobs"] is True
    assert received.whole(received.finish({"response": "", "done": True}, 1.0)) == {
        "response": "ab",
        "done": True,
        "_routing": {},
        "logprobs": [1],
    }


def test_a_coordinator_lists_the_placement_of_its_layers() -> None:
    cluster = {
        "nodes": [node("1"), node("2"), node("3")],
        "deployments": [deployment(), deployment("d2", backend="llama.cpp-local")],
    }
    asked: list[str] = []

    def look(id: str) -> bool:
        asked.append(id)
        return False

    (found,) = coordinators_in(cluster)
    coordinator = replace(found, look=look)
    assert (
        coordinator.base_url == "http://10.0.0.1:11435" and not coordinator.is_running() and asked == ["d1"]
    )
    assert [
        (backend["host"], backend["port"], backend["layers"]) for backend in coordinator.rpc_backends
    ] == [
        ("10.0.0.2", 11436, 4),
        ("10.0.0.9", 50052, 2),
    ]
    assert [(part["first"], part["last"]) for part in coordinator.layers] == [(0, 2), (3, 6), (7, 8)]


def test_a_cluster_of_another_release_is_reported_as_that() -> None:
    unknown = {key: value for key, value in deployment().items() if key != "placed"}
    with pytest.raises(ClientError, match=r"placed.*use the same release"):
        coordinators_in({"nodes": [node("1")], "deployments": [unknown]})


def test_statistics_are_summed_over_the_nodes() -> None:
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


def test_log_messages(caplog: pytest.LogCaptureFixture) -> None:
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
