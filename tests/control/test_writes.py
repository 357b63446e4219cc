"""Created, copied and deleted models are visible on the handling node immediately, and on all within 1 s."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from typing import Any

import pytest

from sollold.engines.install.find import Llama
from sollold.models.gguf.demo_model import GREETING, write
from tests.api.conftest import in_a_thread
from tests.daemons import Cluster, Node, until
from tests.ollama_standin import Known

pytestmark = [pytest.mark.cluster, pytest.mark.llama]

TEMPLATE = "{{ if .System }}[{{ .System }}] {{ end }}({{ .Prompt }}) {{ .Response }}"
PROPAGATION_LIMIT = 5.0
"""Seconds within which every node must learn of a change. The median is below one second."""


@pytest.fixture(scope="module")
def cluster(llama: Llama, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes: an Ollama on the first, a file on the last, neither on the middle one."""
    with in_a_thread([Known("base:7b")]) as standin:
        each: list[dict[str, Any]] = [{"ollama.enabled": "on", "ollama.url": standin}, {}, {}]
        settings = {"placement.context": 512}
        folder = tmp_path_factory.mktemp("writes")
        with Cluster(3, folder, llama, settings=settings, each=each, loopback=True) as cluster:
            write(cluster[2].models / "demo.gguf")
            cluster.together()
            until(lambda: all(has(node, name) for node in cluster for name in ("demo", "base:7b")), "both")
            yield cluster


def has(node: Node, name: str) -> bool:
    return node.ask("POST", "/api/show", {"model": name}).status == 200


def request(node: Node, method: str, path: str, **body: Any) -> None:
    reply = node.ask(method, path, body)
    assert reply.status == 200, reply.body


def propagation_times(cluster: Cluster, through: Node, name: str, present: bool) -> list[float]:
    """Return the seconds until each other node sees the change made through node ``through``."""
    began = time.monotonic()
    assert has(through, name) is present
    others = [node for node in cluster if node is not through]
    times: dict[str, float] = {}
    while len(times) < len(others):
        for node in others:
            if node.name not in times and has(node, name) is present:
                times[node.name] = time.monotonic() - began
        assert time.monotonic() - began < PROPAGATION_LIMIT, f"{name}: {times}"
    return list(times.values())


@pytest.mark.parametrize("base", ["demo", "base:7b"])
def test_all_nodes_see_changes_within_a_second(cluster: Cluster, base: str) -> None:
    times: list[float] = []
    for number, through in enumerate(cluster):
        made, copied = f"made-{number}-{base[:4]}", f"copied-{number}-{base[:4]}"
        request(
            through, "POST", "/api/create", **{"model": made, "from": base, "system": "s", "stream": False}
        )
        times += propagation_times(cluster, through, made, present=True)
        # No node can read the files of the Ollama double, so the Ollama makes the copy.
        request(through, "POST", "/api/copy", source=made, destination=copied)
        times += propagation_times(cluster, through, copied, present=True)
        for name in (copied, made):
            request(through, "DELETE", "/api/delete", model=name)
            times += propagation_times(cluster, through, name, present=False)
    print(f"{len(times)} times heard: median {statistics.median(times):.3f} s, longest {max(times):.3f} s")
    assert statistics.median(times) < 1.0


def test_all_nodes_see_pulled_models_within_a_second(cluster: Cluster) -> None:
    """A new model of an Ollama, and the new holder of a file pulled from another node."""
    first, middle, last = cluster
    request(first, "POST", "/api/pull", model="pulled", stream=False)
    times = propagation_times(cluster, first, "pulled", present=True)
    for line in middle.ask("POST", "/api/pull", {"model": "demo"}).lines:
        assert "error" not in line, line
    assert "node1" in holders(middle, "demo")
    began = time.monotonic()
    until(
        lambda: all("node1" in holders(node, "demo") for node in (first, last)),
        "they hear of it",
        PROPAGATION_LIMIT,
    )
    times.append(time.monotonic() - began)
    request(last, "DELETE", "/api/delete", model="pulled")
    times += propagation_times(cluster, last, "pulled", present=False)
    print(f"{len(times)} times heard: median {statistics.median(times):.3f} s, longest {max(times):.3f} s")
    assert statistics.median(times) < 1.0


def holders(node: Node, name: str) -> list[str]:
    found = [
        model["nodes"]
        for model in node.ask("GET", "/api/tags").json["models"]
        if model["name"] == f"{name}:latest"
    ]
    return [holder for nodes in found for holder in nodes]


def test_a_created_models_template_applies_on_llama_server(cluster: Cluster) -> None:
    """The model is created and used through a node that does not have its file."""
    through = cluster[1]
    request(through, "POST", "/api/create", **{
        "model": "shaped", "from": "demo", "template": TEMPLATE, "system": "Be brief.", "stream": False,
        "messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}],
    })  # fmt: skip
    shown = through.ask("POST", "/api/show", {"model": "shaped"}).json
    assert shown["template"] == TEMPLATE and shown["system"] == "Be brief."
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    prompts = [
        through.ask("POST", "/apply-template", {"model": name, "messages": messages}).json["prompt"]
        for name in ("shaped", "demo")
    ]
    assert prompts[0] == "[Be brief.] (Hi) " and "<|user|>" in prompts[1]
    chat = {"messages": messages[1:], "stream": False, "options": {"temperature": 0, "num_predict": 40}}
    counts = []
    for name in ("shaped", "demo"):
        reply = through.ask("POST", "/api/chat", {"model": name, **chat}).json
        assert GREETING.startswith(reply["message"]["content"][:20]), json.dumps(reply)
        counts.append(reply["prompt_eval_count"])
    # "[Be brief.] (Who?) I.(Hi) " compared with one exchange in the file's template.
    assert counts[0] != counts[1]
