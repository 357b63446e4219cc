"""Large answers and the metrics of many models don't block the event loop."""

from __future__ import annotations

import asyncio
import hashlib

import msgspec
import pytest
from aiohttp import ClientSession
from prometheus_client.parser import text_string_to_metric_families

from sollold.control.activity import FinishedRequest
from sollold.serving.request import Engine
from tests.api.api_parts import PlainCluster, ScriptedService, model, monitor_of, parts
from tests.api.conftest import Serve
from tests.api.test_batch import ended_job
from tests.api.watched_loop import watched

LARGE = 32 << 20
REQUESTS = {
    "whole": ("/apply-template", {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}),
    "streamed": ("/infill", {"model": "demo", "input_prefix": "", "input_suffix": "", "stream": True}),
}


@pytest.mark.parametrize("how", REQUESTS)
async def test_a_large_answer_is_sent_in_pieces(serve: Serve, http: ClientSession, how: str) -> None:
    answer = b'{"prompt":"' + b"x" * LARGE + b'"}'
    path, body = REQUESTS[how]
    url = await serve(parts(ScriptedService(answer)))
    digest, size = hashlib.sha1(), 0
    async with watched() as loop, http.post(url + path, json=body) as got:
        assert got.status == 200
        before = loop.most_memory
        async for piece in got.content.iter_any():
            digest.update(piece)
            size += len(piece)
        most = loop.most_memory - before
    sent = answer if how == "whole" else b"data: " + answer + b"\n\n"
    assert (size, digest.digest()) == (len(sent), hashlib.sha1(sent).digest())
    assert most < LARGE
    # Making one event of the answer copies it once.
    assert how == "streamed" or loop.longest < 0.025


async def test_answers_that_are_not_read_take_limited_memory(serve: Serve, http: ClientSession) -> None:
    size = 8 << 20
    body = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}
    url = await serve(parts(ScriptedService(b'{"prompt":"' + b"x" * size + b'"}')), bodies=40 << 20)
    url += "/apply-template"
    others = {"X-Forwarded-For": "192.168.1.77"}
    unread = [await http.post(url, json=body, headers=others) for _ in range(4)]
    assert [answer.status for answer in unread] == [200, 200, 503, 503]
    refused = await unread[2].json()
    assert "try again later" in refused["error"]["message"] and unread[2].headers["Retry-After"]
    # Other clients still have room.
    async with http.post(url, json=body) as answer:
        assert answer.status == 200 and len(await answer.read()) > size
    for answer in unread:
        answer.close()
    for _ in range(100):
        async with http.post(url, json=body, headers=others) as answer:
            if answer.status == 200:
                assert len(await answer.read()) > size
                break
        await asyncio.sleep(0.05)
    else:
        pytest.fail("the memory of answers that were given up is still counted")


async def test_metrics_of_many_models_do_not_block_the_loop(serve: Serve, http: ClientSession) -> None:
    cluster = PlainCluster()
    monitor = monitor_of(cluster)
    for number in range(500):
        facts = (f"r{number}", 0.0, "/api/chat", f"model{number}", "alpha", "ollama", "ok", "")
        monitor.activity.add_finished(FinishedRequest(*facts, 7, 2, 0.1, 1.0, 0.0, 0.0, 0))
    url = await serve(parts(monitor=monitor, cluster=cluster))

    async def scrape() -> str:
        async with http.get(url + "/metrics") as answer:
            assert answer.status == 200
            return await answer.text()

    async with watched() as loop:
        texts = await asyncio.gather(*(scrape() for _ in range(5)))
    assert loop.longest < 0.03
    for text in texts:
        counts = [
            family for family in text_string_to_metric_families(text) if family.name == "sollold_requests"
        ]
        assert sum(sample.value for sample in counts[0].samples) == 500


def vectors_of(texts: int, width: int) -> list[list[float]]:
    return [[(row * 7 + column) % 1000 / 1001 for column in range(width)] for row in range(texts)]


async def test_a_page_of_a_batchs_vectors_does_not_block_the_loop(serve: Serve, http: ClientSession) -> None:
    rows = vectors_of(32, 2048)
    data = {"embeddings": rows}
    service = ScriptedService(msgspec.json.encode(data), engine=Engine.OLLAMA)
    url = await serve(parts(service, model(source="ollama", capabilities=("embedding",))))
    batch = {"model": "demo", "input": ["a"] * 960}
    async with http.post(url + "/api/batch/embed", json=batch) as answer:
        job = (await answer.json())["job_id"]
    assert (await ended_job(http, url, job))["completed"] == 960
    async with watched() as loop, http.get(f"{url}/api/batch/results/{job}") as answer:
        raw = await answer.read()
    page = msgspec.json.decode(raw)["embeddings"]
    assert len(page) == 960 and len(page[959]) == 2048 and page[0][1] > 0
    assert loop.longest < 0.1


async def test_an_ollamas_vectors_are_passed_on_unchanged(serve: Serve, http: ClientSession) -> None:
    rows = vectors_of(256, 2048)
    data = {"model": "demo", "embeddings": rows, "prompt_eval_count": 3}
    service = ScriptedService(msgspec.json.encode(data), engine=Engine.OLLAMA)
    url = await serve(parts(service, model(source="ollama", capabilities=("embedding",))))
    body = {"model": "demo", "input": ["a"] * 1024}
    async with watched() as loop, http.post(url + "/api/embed", json=body) as answer:
        raw = await answer.read()
    assert loop.longest < 0.1
    whole = msgspec.json.decode(raw)
    assert whole["embeddings"] == rows * 4 and whole["prompt_eval_count"] == 12
