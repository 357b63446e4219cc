"""Three real daemons on a LAN answer with a model that needs the memory of all of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sollold.engines.install.find import Llama
from sollold.models.gguf.demo_model import Recital, counting, write
from tests.daemons import Cluster, Node, until
from tests.gguf import writer
from tests.gguf.size import Size
from tests.single_server import single_server

pytestmark = [pytest.mark.cluster, pytest.mark.llama, pytest.mark.timeout(600)]

PROMPT = {"role": "user", "content": "Tell me a story about a lighthouse."}


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """0.8 GB, 16 layers, random weights."""
    size = writer.sized("llama", 0.8e9, Size(layers=16, embd=1024, heads=16, heads_kv=4, vocab=4096))
    return writer.write(tmp_path_factory.mktemp("models") / "big.gguf", "llama", size)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, big: Path, llama: Llama) -> Iterator[Cluster]:
    # At this verbosity llama-server logs the device of each layer.
    settings = {"placement.context": 1024, "placement.slots": 1, "llama.extra_args": "-lv,5"}
    # No file transfers: some tests depend on which node has which file.
    settings["models.fetch_seconds"] = 0
    folder = tmp_path_factory.mktemp("cluster")
    with Cluster(3, folder, llama, memory="400 MB", settings=settings) as cluster:
        (cluster[0].models / "big.gguf").symlink_to(big)
        for index, words in enumerate((200, 300)):
            write(
                cluster[index].models / f"count{index}.gguf", Recital(counting(words), name=f"count{index}")
            )
        # 430 MB of zeros in addition to the recital: it needs two nodes.
        middle = Recital(counting(100), name="middle", layers=32, hidden=16384)
        write(cluster[1].models / "middle.gguf", middle)
        cluster.together()
        yield cluster


@pytest.fixture
def empty(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster without loaded models; unloads all after the test."""
    unload_all(cluster)
    yield cluster
    unload_all(cluster)


def unload_all(cluster: Cluster) -> None:
    for deployment in cluster.deployments():
        reply = cluster[0].ask("POST", "/api/cluster/unload", {"model": deployment["id"], "force": True})
        assert reply.status == 200, reply.body
    until(lambda: not cluster.deployments(), "all models are unloaded")
    until(lambda: granted(cluster) == 0, "no memory is granted")
    # A plan made while processes are exiting may use more nodes.
    until(lambda: is_free(cluster), "the memory is free again")


def is_free(cluster: Cluster) -> bool:
    nodes = cluster[0].state()["nodes"]
    return all(device["available"] >= 0.97 * device["limit"] for node in nodes for device in node["devices"])


def granted(cluster: Cluster) -> int:
    nodes = cluster[0].state()["nodes"]
    return sum(device["granted"] for node in nodes for device in node["devices"])


def chat(node: Node, model: str, tokens: int = 16, **more: Any) -> dict[str, Any]:
    body = {"model": model, "messages": [PROMPT], "stream": False, **more}
    body.setdefault("options", {"temperature": 0, "num_predict": tokens, "seed": 1})
    reply = node.ask("POST", "/api/chat", body, timeout=240)
    assert reply.status == 200, reply.body
    return dict(reply.json)


def test_three_nodes_find_each_other(cluster: Cluster) -> None:
    for node in cluster:
        assert node.sees() == ["node0", "node1", "node2"]


def test_a_model_too_big_for_one_node_answers_on_every_node_in_every_dialect(empty: Cluster) -> None:
    answers = []
    for node in empty:
        whole = chat(node, "big")
        answers.append(whole["message"]["content"])
        routing = whole["_routing"]
        assert routing["backend"] == "llama.cpp-distributed"
        assert routing["node"] and routing["coordinator_url"].startswith("http://")
        assert routing["duration_ms"] > 0 and len(routing["devices"]) >= 2
        assert whole["done_reason"] in ("stop", "length") and whole["eval_count"] > 0

        body = {"model": "big", "messages": [PROMPT], "options": {"temperature": 0, "num_predict": 16}}
        streamed = node.ask("POST", "/api/chat", body)
        assert streamed.headers["X-Sollold-Backend"] == "llama.cpp-distributed"
        assert streamed.headers["Content-Type"].startswith("application/x-ndjson")
        assert len(streamed.lines) > 2 and streamed.lines[-1]["done"] is True
        answers.append("".join(line["message"]["content"] for line in streamed.lines))

        ask = {"model": "big", "messages": [PROMPT], "temperature": 0, "max_tokens": 16}
        openai = node.ask("POST", "/v1/chat/completions", ask)
        answers.append(openai.json["choices"][0]["message"]["content"])
        events = node.ask("POST", "/v1/chat/completions", {**ask, "stream": True})
        assert events.body.rstrip().endswith(b"data: [DONE]")
        parts = [
            event["choices"][0]["delta"].get("content") or "" for event in events.events if event["choices"]
        ]
        answers.append("".join(parts))

        generated = node.ask("POST", "/api/generate", {"model": "big", "prompt": "A", "stream": False,
                                                       "options": {"num_predict": 4}})  # fmt: skip
        assert generated.json["done"] is True
        completed = node.ask("POST", "/v1/completions", {"model": "big", "prompt": "A", "max_tokens": 4})
        assert completed.json["choices"][0]["finish_reason"]
    assert len(set(answers)) == 1, answers
    assert len(empty.deployments()) == 1


@pytest.mark.parametrize(("model", "layers", "nodes"), [("big", 16, 3), ("middle", 32, 2)])
def test_layers_are_on_the_planned_devices(empty: Cluster, model: str, layers: int, nodes: int) -> None:
    chat(empty[1], model, 2)
    (deployment,) = empty.deployments()
    assert len({share["node"] for share in deployment["placed"]}) == nodes, deployment
    head = next(node for node in empty if node.state()["me"] == deployment["node"])
    logs = sorted((head.folder / "state" / "logs" / deployment["id"]).glob("llama-server*"))
    text = "".join(log.read_text(errors="replace") for log in logs)
    # It logs each layer twice, for a trial and for the load: the last line counts.
    assigned = dict(re.findall(r"layer +(\d+) assigned to device (\w+)", text))
    assert len(assigned) == layers + 1, text[-2000:]
    counts = Counter(assigned.values())
    assert sorted(counts.values()) == sorted(share["last"] - share["first"] for share in deployment["placed"])
    ends = {
        device: max(int(layer) for layer, assigned_to in assigned.items() if assigned_to == device)
        for device in counts
    }
    assert sorted(ends.values()) == sorted(share["last"] - 1 for share in deployment["placed"])


def test_the_sharded_answer_equals_the_unsharded_one(empty: Cluster, big: Path, llama: Llama) -> None:
    sharded = chat(empty[2], "big", 24)["message"]["content"]
    assert answer_of_one_server(llama, big, 24) == sharded


def answer_of_one_server(llama: Llama, model: Path, tokens: int) -> str:
    """The answer of a single llama-server with the whole model."""
    body = {"messages": [PROMPT], "temperature": 0, "max_tokens": tokens, "seed": 1}
    with single_server(llama, model, "-c", "1024", "-np", "1", "--jinja") as url:
        request = urllib.request.Request(
            f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return str(json.load(answer)["choices"][0]["message"]["content"])


def test_two_models_load_and_answer_concurrently(empty: Cluster) -> None:
    answers: dict[str, dict[str, Any]] = {}
    barrier = threading.Barrier(2)

    def ask(name: str) -> None:
        barrier.wait(30)
        answers[name] = chat(empty[2], name, 20)

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("count0", "count1")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    first, second = answers["count0"], answers["count1"]
    assert first["message"]["content"].split() == second["message"]["content"].split()
    both = {"count0", "count1"}
    until(lambda: {item["model"].split(":")[0] for item in empty.deployments()} == both, "both are listed")
    assert {first["_routing"]["node"], second["_routing"]["node"]} == {"node0", "node1"}
    assert first["_routing"]["backend"] == "llama.cpp-local"


def test_concurrent_requests_load_a_model_once(empty: Cluster) -> None:
    answers: list[str] = []
    loads = sum(node.log().count(" is ready after ") for node in empty)

    def ask(node: Node) -> None:
        answers.append(chat(node, "big", 8)["message"]["content"])

    threads = [threading.Thread(target=ask, args=(empty[index % 3],)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    assert len(answers) == 6 and len(set(answers)) == 1
    assert len(empty.deployments()) == 1
    assert sum(node.log().count(" is ready after ") for node in empty) == loads + 1


def test_unloading_releases_all_memory(empty: Cluster) -> None:
    before = [device["available"] for node in empty[0].state()["nodes"] for device in node["devices"]]
    chat(empty[0], "big", 2)
    assert granted(empty) > 0
    reply = empty[1].ask("POST", "/api/generate", {"model": "big", "keep_alive": 0})
    assert reply.lines[-1]["done_reason"] == "unload"
    until(lambda: granted(empty) == 0, "no memory is granted")
    after = [device["available"] for node in empty[0].state()["nodes"] for device in node["devices"]]
    assert after == pytest.approx(before, rel=0.1)


def test_errors_use_the_dialect_of_the_request(cluster: Cluster) -> None:
    node = cluster[1]
    missing = node.ask("POST", "/api/chat", {"model": "nope", "messages": [PROMPT]})
    assert missing.status == 404 and "nope" in missing.json["error"]
    missing = node.ask("POST", "/v1/chat/completions", {"model": "nope", "messages": [PROMPT]})
    assert missing.status == 404 and missing.json["error"]["code"] is not None
    assert node.ask("POST", "/api/chat", b"{not json").status == 400
    assert node.ask("POST", "/v1/chat/completions", b"{not json").json["error"]["message"]
    assert node.ask("GET", "/api/chat").status == 405
    assert node.ask("GET", "/v1/api/version").json["version"].count(".") == 2


def test_a_corrupt_file_is_listed_with_a_reason(cluster: Cluster) -> None:
    (cluster[2].models / "broken.gguf").write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 16)
    try:
        until(lambda: "broken:latest" in reasons(cluster[0]), "the broken file is listed")
        reason = reasons(cluster[0])["broken:latest"]
        assert re.search(r"at byte \d+", reason), reason
        for path in ("/api/chat", "/v1/chat/completions"):
            reply = cluster[0].ask("POST", path, {"model": "broken", "messages": [PROMPT]})
            assert reply.status == 400, reply.body
            assert reason in json.dumps(reply.json["error"]), reply.body
        assert chat(cluster[2], "count0", 3)
    finally:
        (cluster[2].models / "broken.gguf").unlink()


def reasons(node: Node) -> dict[str, str]:
    """The reason for each unusable model."""
    return {model["name"]: model["unusable"] for model in tags(node) if model.get("unusable")}


def tags(node: Node) -> list[dict[str, Any]]:
    return list(node.ask("GET", "/api/tags?unusable=true").json["models"])


def test_each_model_is_listed_once_on_all_nodes(cluster: Cluster) -> None:
    for node in cluster:
        names = [model["name"].split(":")[0] for model in tags(node)]
        assert names.count("big") == 1 and {"big", "count0", "count1"} <= set(names)


def test_the_plan_of_a_model_that_does_not_fit_states_the_missing_memory(empty: Cluster) -> None:
    reply = empty[1].ask("POST", "/api/cluster/plan", {"model": "big", "context": 8192, "kv": "f32"})
    assert reply.status == 200
    assert reply.json["ok"] is False
    assert re.search(r"\d+(\.\d+)? [MG]iB", reply.json["reason"])


@pytest.mark.parametrize("which", ["http", "peer"])
def test_a_port_in_use_is_named_in_the_last_line(cluster: Cluster, tmp_path: Path, which: str) -> None:
    node = cluster[0]
    words = [sys.executable, "-m", "sollold", "run", "--config", "/dev/null"]
    for setting in (f"node.state_dir={tmp_path}", "ollama.enabled=off", "cluster.mdns=off"):
        words += ["--set", setting]
    words += ["--host", "0.0.0.0" if node.machine else node.address]
    words += ["--port", str(node.http if which == "http" else 0)]
    words += ["--peer-port", str(node.peer if which == "peer" else 0)]
    if node.machine is None:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    else:
        done = node.machine.run(words, timeout=60, check=False)
    assert done.returncode == 1
    assert str(getattr(node, which)) in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
