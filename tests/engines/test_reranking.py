"""Rerankers: recognition by the header, start by the agent, and the API."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest

from sollold.api.http.application import Listener, build_app
from sollold.cluster.gossip.record import State
from sollold.engines.install.find import Llama
from sollold.models.gguf.reader import read
from sollold.models.model import Model
from sollold.models.stores.header_facts import facts_of
from sollold.settings.schema import HttpSettings
from tests.agent_cluster import plan, running_agents
from tests.api.api_parts import PlainLibrary, parts
from tests.api.direct_service import DirectService
from tests.gguf.reranker import write_reranker
from tests.gguf.writer import write


def model_of(file: Path) -> Model:
    facts = facts_of(read(file))
    return Model(
        "rank:latest",
        "e" * 64,
        "folder",
        facts.files,
        facts.size,
        0.0,
        layers=facts.layers,
        capabilities=facts.capabilities,
    )


def test_a_reranker_is_recognized_by_its_pooling_type_or_its_head(tmp_path: Path) -> None:
    for says_so in (True, False):
        file = write_reranker(tmp_path / f"{says_so}.gguf", says_so=says_so)
        assert model_of(file).capabilities == ("embedding", "rerank")
    assert model_of(write(tmp_path / "embed.gguf", "bert")).capabilities == ("embedding",)


@pytest.mark.llama
async def test_documents_are_ordered_by_a_query(folder: Path, llama: Llama, tmp_path: Path) -> None:
    model = model_of(write_reranker(tmp_path / "rank.gguf"))
    async with running_agents(folder, llama, "a") as cluster:
        cluster.models[model.digest] = model
        embedding_plan = plan(model, "a")
        embedding_plan = replace(embedding_plan, run=replace(embedding_plan.run, embedding=True))
        assert (await cluster.deploy("rank", embedding_plan)).ok
        await cluster.until("a", "rank", State.READY)
        engine = cluster.agents["a"].deployments.address("rank")
        assert engine is not None
        service = DirectService({model.name: engine.url}, key=engine.key)
        settings = HttpSettings(host="127.0.0.1", port=0)
        listener = Listener(build_app(parts(service, library=PlainLibrary(model)), settings), settings)
        await listener.start()
        url = f"http://127.0.0.1:{listener.port}"
        try:
            async with aiohttp.ClientSession() as http:
                body = {"model": "rank", "query": "one", "documents": ["two", "three four", "five"]}
                async with http.post(f"{url}/v1/rerank", json=body) as answer:
                    ranking = await answer.json()
                    assert answer.status == 200, ranking
                results = ranking["results"]
                assert sorted(result["index"] for result in results) == [0, 1, 2]
                scores = [result["relevance_score"] for result in results]
                assert scores == sorted(scores, reverse=True) and len(set(scores)) == 3
                async with http.post(f"{url}/v1/rerank", json={**body, "top_n": 1}) as answer:
                    assert [result["index"] for result in (await answer.json())["results"]] == [
                        results[0]["index"]
                    ]
                async with http.post(
                    f"{url}/v1/embeddings", json={"model": "rank", "input": "one"}
                ) as answer:
                    assert answer.status == 400 and "reranker" in await answer.text()
        finally:
            await listener.close()
