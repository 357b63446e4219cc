"""Drafting by a model's own layer for next-token prediction, with real llama-server, workers and daemons."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sollold.engines.install.find import Llama
from sollold.models.footprint.run_options import Run
from sollold.models.gguf.demo_model import Recital, counting, write
from tests.daemons import Cluster, until
from tests.gguf import llama_run, writer
from tests.gguf.llama_run import Workers
from tests.gguf.size import Size

WORDS = counting(1500)
PLAIN = Run(context=1024, slots=1, flash="on")
DRAFTING = Run(context=1024, slots=1, flash="on", drafts=3, predicts=True)

pytestmark = pytest.mark.llama


@pytest.fixture(scope="module")
def rpc_workers(llama: Llama) -> Iterator[Workers]:
    with llama_run.workers(2) as running:
        yield running


@pytest.mark.parametrize("split", [(), (3, 3)])
def test_correct_predictions_are_accepted(
    tmp_path: Path, rpc_workers: Workers, split: tuple[int, ...]
) -> None:
    model = tmp_path / "count.gguf"
    write(model, Recital(WORDS, name="count", layers=4, predicts=True))
    (answer,) = llama_run.answered(model, DRAFTING, rpc_workers, split, prompts=[[5]], tokens=80)
    assert answer["content"] == "".join(WORDS[:80])
    timings = answer["timings"]
    assert timings["draft_n_accepted"] == timings["draft_n"] >= 50


@pytest.mark.parametrize(
    ("architecture", "split"),
    [("glm4moe", ()), ("glm4moe", (3, 3)), ("deepseek2", (3, 3)), ("qwen35", (3, 3)), ("qwen35moe", ())],
)
def test_rejected_predictions_change_no_token(
    tmp_path: Path, rpc_workers: Workers, architecture: str, split: tuple[int, ...]
) -> None:
    model = writer.write(tmp_path / "a.gguf", architecture, Size(layers=5, nextn=1))
    # The second prompt reuses the slot's cache from the first, after rejected drafts were removed from it.
    prompts = [list(range(300, 400)), [*range(300, 380), 7, 8, 9]]
    plain, drafted = (
        llama_run.answered(model, run, rpc_workers, split, prompts=prompts, tokens=24)
        for run in (PLAIN, DRAFTING)
    )
    assert [completion["tokens"] for completion in drafted] == [completion["tokens"] for completion in plain]
    assert all(completion["timings"]["draft_n"] for completion in drafted)


@pytest.mark.cluster
def test_the_own_layer_drafts_for_a_model_on_two_machines(tmp_path: Path, llama: Llama) -> None:
    settings = {"placement.slots": 2, "placement.speculation": "mtp"}
    with Cluster(2, tmp_path, llama, settings=settings) as cluster:
        node = cluster[0]
        write(node.models / "count.gguf", Recital(WORDS, name="count", layers=4, predicts=True))
        cluster.together()
        request = {"model": "count", "policy": "spread"}
        plan = node.ask("POST", "/api/cluster/plan", request).json["plan"]
        assert "the model's own MTP layer, on node" in " ".join(plan["reasons"])
        loaded = node.ask("POST", "/api/cluster/load", request, timeout=120)
        assert loaded.status == 200, loaded.body
        body = {"model": "count", "messages": [{"role": "user", "content": "x"}], "max_tokens": 60}
        answer = node.ask("POST", "/v1/chat/completions", body).json
        assert answer["choices"][0]["message"]["content"] == "".join(WORDS[:60])

        def drafts() -> dict[str, object]:
            (deployment,) = node.state()["deployments"]
            assert len({placed["node"] for placed in deployment["placed"] if placed["bytes"]}) == 2
            return dict(deployment["speculation"])

        until(lambda: drafts()["tokens"], "the answer is counted")
        assert drafts()["by"] == "mtp" and drafts()["acceptance"] == 1.0
