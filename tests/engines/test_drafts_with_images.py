"""Models that see images are drafted for: a real daemon, real llama-servers, tiny projectors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sollold.engines.install.find import Llama
from sollold.models.gguf.demo_model import Recital, counting, write
from tests.api.picture import PICTURE
from tests.api.reciters import PATCHES
from tests.daemons import Cluster, Node, until
from tests.gguf import projector, writer
from tests.gguf.size import Size

WORDS = counting(1500)
BLIND = "it reads images, which llama.cpp can't combine with drafts by"

pytestmark = [pytest.mark.llama, pytest.mark.cluster]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, llama: Llama) -> Iterator[Node]:
    with Cluster(1, tmp_path_factory.mktemp("seeing"), llama, settings={"placement.slots": 1}) as cluster:
        models = cluster[0].models
        see = Recital(WORDS, name="see")
        _with_eyes(models / "see", lambda file: write(file, see), see.width)
        small = Recital(WORDS, name="small", layers=1, width=192)
        _with_eyes(models / "small", lambda file: write(file, small), small.width)
        for name in ("qwen35", "deepseek2"):
            size = Size(layers=5, nextn=1)
            _with_eyes(
                models / name,
                lambda file, n=name, s=size: writer.write(file, n, s),
                size.embd,
                name == "qwen35",
            )
        fourfold = Size(layers=3)
        _with_eyes(
            models / "qwen2vl", lambda file: writer.write(file, "qwen2vl", fourfold), fourfold.embd, True
        )
        writer.write(models / "qwen2.gguf", "qwen2", Size(layers=1))
        cluster.together()
        yield cluster[0]


def _with_eyes(folder: Path, write_model: Any, width: int, merging: bool = False) -> None:
    folder.mkdir(parents=True)
    write_model(folder / f"{folder.name}.gguf")
    (projector.write_merging if merging else projector.write)(folder / "mmproj.gguf", width)


def load(node: Node, model: str, speculation: str) -> None:
    wish = {"model": model, "speculation": speculation}
    loaded = node.ask("POST", "/api/cluster/load", wish, timeout=120)
    assert loaded.status == 200, loaded.body


def look(node: Node, model: str, tokens: int) -> dict[str, Any]:
    shown = {"role": "user", "content": "What is this?", "images": [PICTURE]}
    body = {"model": model, "messages": [shown], "stream": False}
    answer = node.ask("POST", "/api/chat", {**body, "options": {"num_predict": tokens, "temperature": 0}})
    assert answer.status == 200, answer.body
    return dict(answer.json)


def drafts(node: Node, model: str) -> dict[str, Any]:
    return next(
        dict(one["speculation"]) for one in node.state()["deployments"] if one["model"] == f"{model}:latest"
    )


@pytest.mark.parametrize("speculation", ["ngram", "small"])
def test_an_answer_on_an_image_is_drafted(node: Node, speculation: str) -> None:
    load(node, "see", speculation)
    answer = look(node, "see", 60)
    assert answer["message"]["content"] == "".join(WORDS[:60])
    assert answer["prompt_eval_count"] > PATCHES
    until(lambda: drafts(node, "see")["tokens"], "the answer is counted")
    assert drafts(node, "see")["by"] == (speculation if speculation == "ngram" else "small:latest")
    if speculation == "small":
        assert drafts(node, "see")["accepted"] >= 30


def test_a_layer_of_its_own_drafts_for_an_answer_on_an_image(node: Node) -> None:
    load(node, "qwen35", "mtp")
    assert look(node, "qwen35", 24)["eval_count"] > 0
    until(lambda: drafts(node, "qwen35")["drafted"], "the answer is counted")
    assert drafts(node, "qwen35")["by"] == "mtp"


@pytest.mark.parametrize(("model", "speculation"), [("deepseek2", "mtp"), ("qwen2vl", "qwen2")])
def test_drafts_that_would_lose_count_at_an_image_are_not_made(
    node: Node, model: str, speculation: str
) -> None:
    planned = node.ask("POST", "/api/cluster/plan", {"model": model, "speculation": speculation}).json
    assert any(BLIND in reason for reason in planned["plan"]["reasons"]), planned["plan"]["reasons"]
