"""The context of requests to a real llama-server, from short to long prompts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from sollold.engines.install.find import Llama
from sollold.models.gguf import demo_model
from sollold.models.gguf.demo_model import GREETING, Recital, pieces
from tests.daemons import Cluster, Node, Reply

pytestmark = [pytest.mark.llama, pytest.mark.cluster]

TRAINED = 4096


def chat(path: str, size: int, **more: Any) -> dict[str, Any]:
    """Return a request of at least ``size`` tokens: the model tokenizes unknown text byte by byte."""
    message = {"role": "user", "content": "?" * size}
    limit = {"options": {"num_predict": 4} | more} if path == "/api/chat" else {"max_tokens": 4, **more}
    return {"model": "demo", "messages": [message], "stream": False, **limit}


def prompt_tokens(reply: Reply) -> int:
    assert reply.status == 200, reply.body
    return int(reply.json.get("prompt_eval_count") or reply.json["usage"]["prompt_tokens"])


def contexts(node: Node) -> list[int]:
    return [deployment["context"] for deployment in node.ask("GET", "/api/cluster").json["deployments"]]


def test_no_prompt_within_the_trained_context_is_shortened_or_refused(tmp_path: Path, llama: Llama) -> None:
    settings = {"placement.context": 512, "placement.slots": 2}
    with Cluster(1, tmp_path, llama, settings=settings, start=False, loopback=True) as cluster:
        demo_model.write(cluster[0].models / "demo.gguf", Recital(pieces(GREETING), context=TRAINED))
        cluster[0].start()
        cluster.together()

        def ask(path: str, size: int, **more: Any) -> Reply:
            return cluster[0].ask("POST", path, chat(path, size, **more), timeout=120)

        assert prompt_tokens(ask("/api/chat", 20, num_ctx=256)) >= 20
        assert contexts(cluster[0]) == [256]
        # The node's metrics include the engine's counters.
        metrics = cluster[0].ask("GET", "/metrics").body.decode()
        assert re.search(r'^llamacpp:prompt_tokens_total{[^}]*model="demo:latest"', metrics, re.MULTILINE)
        # A request without a context gets that of the settings, whatever the model was loaded with.
        assert prompt_tokens(ask("/api/chat", 400)) >= 400
        assert max(contexts(cluster[0])) == 512
        # Longer prompts load more context, also in dialects without a context option.
        assert prompt_tokens(ask("/v1/chat/completions", 1500)) >= 1500
        assert prompt_tokens(ask("/api/chat", 2500)) >= 2500
        refused = ask("/v1/chat/completions", TRAINED)
        assert refused.status == 400
        assert refused.json["error"]["code"] == "context_length_exceeded"
