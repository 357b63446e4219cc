"""``/v1/rerank`` with requests of clients of llama-server, Jina and Cohere."""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp import ClientSession

from tests.api.api_parts import ScriptedService, call_of, model, parts
from tests.api.conftest import Serve
from tests.api.dialects import error_of, post

RANKER = model("rank:latest", capabilities=("embedding", "rerank"))
ANSWER = {"results": [{"index": 1, "relevance_score": 0.9}, {"index": 0, "relevance_score": 0.1}]}
ASK: dict[str, Any] = {"model": "rank", "query": "q", "documents": ["a", "b"]}


@pytest.mark.parametrize(
    "path",
    ["/rerank", "/reranking", "/v1/rerank", "/v1/reranking", "/v2/rerank", "/v1/v1/rerank", "/v1/rerank/"],
)
async def test_all_paths_of_rerank(serve: Serve, http: ClientSession, path: str) -> None:
    url = await serve(parts(ScriptedService(ANSWER), RANKER))
    assert (await post(http, url + path, ASK))[:2] == (200, ANSWER)


async def test_documents_are_texts_or_objects_and_are_returned_on_request(
    serve: Serve, http: ClientSession
) -> None:
    service = ScriptedService(ANSWER)
    url = await serve(parts(service, RANKER)) + "/v1/rerank"
    body = {**ASK, "query": {"text": "q"}, "documents": ["a", {"text": "b", "id": 5}], "top_n": "2"}
    _, answer, _ = await post(http, url, {**body, "return_documents": True, "truncation": True})
    assert [result["document"] for result in answer["results"]] == [{"text": "b"}, {"text": "a"}]
    sent = call_of(service).body
    assert (sent["query"], sent["documents"], sent["top_n"]) == ("q", ["a", "b"], 2)
    assert "return_documents" not in sent
    _, answer, _ = await post(http, url, {**body, "return_documents": False})
    assert "document" not in answer["results"][0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"query": ""}, "query"),
        ({"query": {"image": "x"}}, "query"),
        ({"documents": []}, "documents"),
        ({"documents": [{"image": "x"}]}, "a document"),
        ({"documents": [5]}, "documents"),
        ({"top_n": -1}, "top_n"),
        ({"top_n": 2**40}, "top_n"),
    ],
)
async def test_queries_and_documents_without_text_are_refused(
    serve: Serve, http: ClientSession, more: Any, message: str
) -> None:
    service = ScriptedService(ANSWER)
    url = await serve(parts(service, RANKER))
    status, answer, _ = await post(http, f"{url}/v1/rerank", {**ASK, **more})
    assert status == 400 and message in error_of("/v1", answer) and not service.asks
