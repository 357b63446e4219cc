"""Speculative decoding for models with projectors, with a real daemon and llama-server."""

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
REFUSAL = "it reads images, which llama.cpp can't combine with drafts by"

pytestmark = [pytest.mark.llama, pytest.mark.cluster]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, llama: Llama) -> Iterator[Node]:
    with Cluster(1, tmp_path_factory.mktemp("seeing"), llama, settings={"placement.slots": 1}) as cluster:
        models = cluster[0].models
        see = Recital(WORDS, name="see")
        _write_with_projector(models / "see", lambda file: write(file, see), see.width)
        small = Recital(WORDS, name="small", layers=1, width=192)
        _write_with_projector(models / "small", lambda file: write(file, small), small.width)
        for name in ("qwen35", "deepseek2"):
            size = Size(layers=5, nextn=1)
            _write_with_projector(
                models / name,
                lambda file, n=name, s=size: writer.write(file, n, s),
                size.embd,
                name == "qwen35",
            )
        qwen2vl = Size(layers=3)
        _write_with_projector(
            models / "qwen2vl", lambda file: writer.write(file, "qwen2vl", qwen2vl), qwen2vl.embd, True
        )
        writer.write(models / "qwen2.gguf", "qwen2", Size(layers=1))
        cluster.together()
        yield cluster[0]


def _write_with_projector(folder: Path, write_model: Any, width: int, merging: bool = False) -> None:
    """Write a model and its projector; ``merging``: one for images of any size."""
    folder.mkdir(parents=True)
    write_model(folder / f"{folder.name}.gguf")
    (projector.write_merging if merging else projector.write)(folder / "mmproj.gguf", width)


def load(node: Node, model: str, speculation: str) -> None:
    request = {"model": model, "speculation": speculation}
    loaded = node.ask("POST", "/api/cluster/load", request, timeout=120)
    assert loaded.status == 200, loaded.body


def describe_image(node: Node, model: str, tokens: int) -> dict[str, Any]:
    message = {"role": "user", "content": "What is this?", "images": [PICTURE]}
    body = {"model": model, "messages": [message], "stream": False}
    answer = node.ask("POST", "/api/chat", {**body, "options": {"num_predict": tokens, "temperature": 0}})
    assert answer.status == 200, answer.body
    return dict(answer.json)


def drafts(node: Node, model: str) -> dict[str, Any]:
    return next(
        dict(deployment["speculation"])
        for deployment in node.state()["deployments"]
        if deployment["model"] == f"{model}:latest"
    )


@pytest.mark.parametrize("speculation", ["ngram", "small"])
def test_an_answer_to_an_image_is_drafted(node: Node, speculation: str) -> None:
    load(node, "see", speculation)
    answer = describe_image(node, "see", 60)
    assert answer["message"]["content"] == "".join(WORDS[:60])
    assert answer["prompt_eval_count"] > PATCHES
    until(lambda: drafts(node, "see")["tokens"], "the answer is counted")
    assert drafts(node, "see")["by"] == (speculation if speculation == "ngram" else "small:latest")
    if speculation == "small":
        assert drafts(node, "see")["accepted"] >= 30


def test_an_answer_to_an_image_is_drafted_by_the_models_own_layer(node: Node) -> None:
    load(node, "qwen35", "mtp")
    assert describe_image(node, "qwen35", 24)["eval_count"] > 0
    until(lambda: drafts(node, "qwen35")["drafted"], "the answer is counted")
    assert drafts(node, "qwen35")["by"] == "mtp"


@pytest.mark.parametrize(("model", "speculation"), [("deepseek2", "mtp"), ("qwen2vl", "qwen2")])
def test_kinds_of_drafting_that_can_not_handle_images_are_refused(
    node: Node, model: str, speculation: str
) -> None:
    planned = node.ask("POST", "/api/cluster/plan", {"model": model, "speculation": speculation}).json
    assert any(REFUSAL in reason for reason in planned["plan"]["reasons"]), planned["plan"]["reasons"]
