"""What was created, copied or deleted through one node is so there at once, on all others within a second."""

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
HELD = 5.0
"""Seconds after which a node counts as one that never hears of it; most hear within one."""


@pytest.fixture(scope="module")
def cluster(llama: Llama, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """An Ollama at the first node, a file at the last; the one between has neither."""
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


def asked(node: Node, method: str, path: str, **body: Any) -> None:
    reply = node.ask(method, path, body)
    assert reply.status == 200, reply.body


def heard(cluster: Cluster, through: Node, name: str, there: bool) -> list[float]:
    """Seconds until each other node knows what ``through`` knows at once."""
    began = time.monotonic()
    assert has(through, name) is there
    others = [node for node in cluster if node is not through]
    times: dict[str, float] = {}
    while len(times) < len(others):
        for node in others:
            if node.name not in times and has(node, name) is there:
                times[node.name] = time.monotonic() - began
        assert time.monotonic() - began < HELD, f"{name}: {times}"
    return list(times.values())


@pytest.mark.parametrize("base", ["demo", "base:7b"])
def test_all_nodes_hear_of_it_within_a_second(cluster: Cluster, base: str) -> None:
    times: list[float] = []
    for number, through in enumerate(cluster):
        made, copied = f"made-{number}-{base[:4]}", f"copied-{number}-{base[:4]}"
        asked(through, "POST", "/api/create", **{"model": made, "from": base, "system": "s", "stream": False})
        times += heard(cluster, through, made, there=True)
        # Where no node can read the files, as at the stand-in, the Ollama itself gives the second name.
        asked(through, "POST", "/api/copy", source=made, destination=copied)
        times += heard(cluster, through, copied, there=True)
        for name in (copied, made):
            asked(through, "DELETE", "/api/delete", model=name)
            times += heard(cluster, through, name, there=False)
    print(f"{len(times)} times heard: median {statistics.median(times):.3f} s, longest {max(times):.3f} s")
    assert statistics.median(times) < 1.0


def test_all_nodes_hear_of_what_was_pulled_within_a_second(cluster: Cluster) -> None:
    """An Ollama's by a new name, and a file that came from another node: who has it now."""
    first, middle, last = cluster
    asked(first, "POST", "/api/pull", model="pulled", stream=False)
    times = heard(cluster, first, "pulled", there=True)
    for line in middle.ask("POST", "/api/pull", {"model": "demo"}).lines:
        assert "error" not in line, line
    assert "node1" in holders(middle, "demo")
    began = time.monotonic()
    until(lambda: all("node1" in holders(node, "demo") for node in (first, last)), "they hear of it", HELD)
    times.append(time.monotonic() - began)
    asked(last, "DELETE", "/api/delete", model="pulled")
    times += heard(cluster, last, "pulled", there=False)
    print(f"{len(times)} times heard: median {statistics.median(times):.3f} s, longest {max(times):.3f} s")
    assert statistics.median(times) < 1.0


def holders(node: Node, name: str) -> list[str]:
    found = [
        one["nodes"] for one in node.ask("GET", "/api/tags").json["models"] if one["name"] == f"{name}:latest"
    ]
    return [holder for nodes in found for holder in nodes]


def test_a_template_counts_on_our_own_engine(cluster: Cluster) -> None:
    """Created through a node that has nothing of the model, and asked on it."""
    through = cluster[1]
    asked(through, "POST", "/api/create", **{
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
        said = through.ask("POST", "/api/chat", {"model": name, **chat}).json
        assert GREETING.startswith(said["message"]["content"][:20]), json.dumps(said)
        counts.append(said["prompt_eval_count"])
    # "[Be brief.] (Who?) I.(Hi) " beside one exchange of the file's own template.
    assert counts[0] != counts[1]
