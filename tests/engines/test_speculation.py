"""Speculative decoding by n-grams and by a draft model, with a real daemon and llama-server."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from sollold.engines.install.find import Llama
from sollold.models.gguf.demo_model import Recital, counting, write
from sollold.serving.local_stream import Figures, figures_in
from tests.daemons import Cluster, Node, until

WORDS = counting(1500)
KNOWN = 200
"""Number of words of the answer that are already in the question."""


def test_figures_of_an_answer_include_its_drafts() -> None:
    timings = b'"timings":{"predicted_n":40,"predicted_per_second":8.5'
    assert figures_in(timings + b"}}") == Figures(8.5, 40)
    drafts = b',"draft_n":32,"draft_n_accepted":24}}\n\ndata: [DONE]\n\n'
    assert figures_in(timings + drafts) == Figures(8.5, 40, 32, 24)
    assert figures_in(b'{"predicted_n":1,"predicted_per_second":1e999}') is None
    assert figures_in(b'{"eval_count":0,"eval_duration":5}') is None
    assert figures_in(b'{"eval_count":10,"eval_duration":2000000000}') == Figures(5.0, 10)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, llama: Llama) -> Iterator[Node]:
    folder = tmp_path_factory.mktemp("speculation")
    with Cluster(1, folder, llama, settings={"placement.slots": 2}) as cluster:
        write(cluster[0].models / "count.gguf", Recital(WORDS, name="count"))
        write(cluster[0].models / "small.gguf", Recital(WORDS, name="small", layers=1, width=192))
        cluster.together()
        request = {"model": "count", "speculation": "ngram"}
        planned = cluster[0].ask("POST", "/api/cluster/plan", request)
        assert "drafted from repeats" in " ".join(planned.json["plan"]["reasons"])
        loaded = cluster[0].ask("POST", "/api/cluster/load", request, timeout=120)
        assert loaded.status == 200, loaded.body
        yield cluster[0]


def question(tokens: int) -> dict[str, Any]:
    text = "".join(WORDS[:KNOWN])
    return {"model": "count", "messages": [{"role": "user", "content": text}], "max_tokens": tokens}


def drafts(node: Node) -> dict[str, Any]:
    return dict(node.state()["deployments"][0]["speculation"])


@pytest.mark.cluster
@pytest.mark.llama
def test_drafts_are_accepted_and_counted(node: Node) -> None:
    none = dict.fromkeys(("tokens", "drafted", "accepted", "acceptance"), 0)
    assert drafts(node) == {"by": "ngram", "length": drafts(node)["length"], **none}
    answer = node.ask("POST", "/v1/chat/completions", question(KNOWN))
    assert answer.json["choices"][0]["message"]["content"] == "".join(WORDS[:KNOWN])
    until(lambda: drafts(node)["tokens"], "the answer is counted")
    counted = drafts(node)
    assert counted["tokens"] == KNOWN
    assert KNOWN / 2 < counted["accepted"] <= counted["drafted"]
    body = {"model": "count", "messages": [{"role": "user", "content": "x"}], "stream": False}
    routing = node.ask("POST", "/api/chat", {**body, "options": {"num_predict": 2}}).json["_routing"]
    assert routing["speculation"] == {"by": "ngram", "acceptance": counted["acceptance"]}
    exact = node.ask("POST", "/api/chat", {**body, "logprobs": True, "options": {"num_predict": 2}})
    assert "have no probabilities" in exact.json["_routing"]["warnings"][0]
    metrics = node.ask("GET", "/metrics").body.decode()
    assert "sollold_endpoint_accepted_tokens_total{" in metrics


@pytest.mark.cluster
@pytest.mark.llama
def test_a_draft_model_drafts(node: Node) -> None:
    request = {"model": "count", "speculation": "small"}
    loaded = node.ask("POST", "/api/cluster/load", request, timeout=120)
    assert loaded.status == 200, loaded.body
    until(lambda: drafts(node)["by"] == "small:latest", "it is loaded again")
    body = {"model": "count", "messages": [{"role": "user", "content": "x"}], "max_tokens": 50}
    answer = node.ask("POST", "/v1/chat/completions", body)
    assert answer.json["choices"][0]["message"]["content"] == "".join(WORDS[:50])
    until(lambda: drafts(node)["tokens"], "the answer is counted")
    assert drafts(node)["accepted"] >= 30


@pytest.mark.cluster
@pytest.mark.llama
def test_an_answer_with_drafts_is_resumed_after_a_crash(node: Node) -> None:
    parts: list[str] = []
    killed = False
    with node.open("POST", "/api/chat", {**question(0), "options": {"num_predict": 1400}}) as response:
        for line in response:
            parts.append(line.decode())
            if not killed and len(parts) > 20:
                assert node.process is not None
                for child in psutil.Process(node.process.pid).children():
                    if "llama-server" in " ".join(child.cmdline()):
                        os.kill(child.pid, signal.SIGKILL)
                        killed = True
    lines = [json.loads(part) for part in parts]
    assert killed and lines[-1]["_routing"]["resumed"] == 1
    assert "".join(line["message"]["content"] for line in lines) == "".join(WORDS[:1400])


@pytest.mark.cluster
@pytest.mark.llama
def test_a_request_with_the_same_kind_of_drafting_reloads_nothing(node: Node) -> None:
    def warnings(path: str, speculation: str) -> list[str]:
        body = {"model": "count", "messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
        reply = node.ask("POST", path, {**body, "placement": {"speculation": speculation}})
        assert reply.status == 200, reply.body
        return [reply.headers.get("X-Sollold-Warning", "")]

    def running() -> tuple[str, str]:
        (ready,) = [
            deployment for deployment in node.state()["deployments"] if deployment["state"] == "ready"
        ]
        return ready["id"], (ready["speculation"] or {}).get("by", "")

    assert warnings("/v1/chat/completions", "small") == [""]
    before = running()
    assert before[1] == "small:latest"
    for path, how in (("/v1/messages", "SMALL"), ("/v1/chat/completions", "small:latest")):
        assert warnings(path, how) == [""] and running() == before
    (warning,) = warnings("/v1/messages", "ngram")
    assert not warning and running()[1] == "ngram"
    body = {"model": "count", "messages": [{"role": "user", "content": "x"}], "stream": False}
    routing = node.ask("POST", "/api/chat", {**body, "options": {"num_predict": 2}}).json["_routing"]
    assert routing["speculation"] == {"by": "ngram"}, "no acceptance before the first draft"
    assert warnings("/v1/chat/completions", "Off") == [""]
    before = running()
    assert before[1] == ""
    for how, words in (("off", ""), ("auto", ""), ("nobody", "speculation nobody")):
        (warning,) = warnings("/v1/messages", how)
        assert words in warning and bool(words) == bool(warning) and running() == before
