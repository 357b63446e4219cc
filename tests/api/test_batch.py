"""Embedding batches: order, low priority, retries, deadlines, cancellation and limits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession

from sollold.control.keys import Keys, Scope
from sollold.errors import Fault, Refusal
from sollold.serving.batch import LARGEST, Batches, JobState
from sollold.serving.request import Answer, Ask, Call, Engine
from tests.api.api_parts import TRUSTED_PROXIES, model, parts, routing, singly
from tests.api.conftest import Serve
from tests.doubles import FakeView, record, until
from tests.models.fakes import FakeCalls


@pytest.fixture
async def batches() -> AsyncIterator[Batches]:
    service = Batches(piece=4, at_once=3, jobs=4, running=2, floats=1000, pause=0.01)
    yield service
    await service.close()


async def ended(batches: Batches, id_: str) -> None:
    await until(lambda: batches.job(id_).progress is not JobState.RUNNING, 5)


async def lengths(texts: Sequence[str]) -> list[list[float]]:
    await asyncio.sleep(0)
    return [[float(len(text))] for text in texts]


async def test_vectors_come_in_the_order_of_the_texts(batches: Batches) -> None:
    job = batches.submit("m", ["x" * count for count in range(1, 31)], lengths)
    await ended(batches, job.id)
    assert job.progress is JobState.DONE and job.done == 30 and not job.errors
    assert [vector[0] for vector in job.vectors if vector is not None] == [
        float(count) for count in range(1, 31)
    ]


async def test_running_batches_are_limited_per_client_and_in_total() -> None:
    batches, never = Batches(running=3, running_each=2), asyncio.Event()

    async def embed(texts: Sequence[str]) -> list[list[float]]:
        await never.wait()
        return []

    for _ in range(2):
        batches.submit("m", ["a"], embed, "10.0.0.9")
    with pytest.raises(Refusal, match="2 of your batches are already running"):
        batches.submit("m", ["a"], embed, "10.0.0.9")
    batches.submit("m", ["a"], embed, "10.0.0.8")
    with pytest.raises(Refusal, match="3 batches are already running"):
        batches.submit("m", ["a"], embed, "10.0.0.7")
    await batches.close()


async def test_a_piece_refused_as_unavailable_is_retried(batches: Batches) -> None:
    refused = 0

    async def embed(texts: Sequence[str]) -> list[list[float]]:
        nonlocal refused
        if refused < 3:
            refused += 1
            raise Refusal(Fault.UNAVAILABLE, "the queue is full")
        return await lengths(texts)

    job = batches.submit("m", ["a"] * 10, embed)
    await ended(batches, job.id)
    assert job.progress is JobState.DONE and refused == 3 and not job.errors


async def test_a_refused_text_fails_alone(batches: Batches) -> None:
    async def embed(texts: Sequence[str]) -> list[list[float]]:
        if "bad" in texts:
            raise Refusal(Fault.ENGINE, "it is too long")
        return await lengths(texts)

    job = batches.submit("m", ["a"] * 5 + ["bad"] + ["a"] * 4, embed)
    await ended(batches, job.id)
    assert job.progress is JobState.DONE and job.errors == {5: "it is too long"} and job.done == 10
    assert [vector is None for vector in job.vectors] == [False] * 5 + [True] + [False] * 4
    everything = batches.submit("m", ["bad"], embed)
    await ended(batches, everything.id)
    assert everything.progress is JobState.FAILED


async def test_a_text_that_kills_engines_fails_alone_after_a_few_attempts(
    batches: Batches,
) -> None:
    sizes: list[int] = []

    async def embed(texts: Sequence[str]) -> list[list[float]]:
        if "bad" in texts:
            sizes.append(len(texts))
            raise Refusal(Fault.INTERRUPTED, "the engine died")
        return await lengths(texts)

    job = batches.submit("m", ["a"] * 5 + ["bad"] + ["a"] * 4, embed)
    await ended(batches, job.id)
    assert job.progress is JobState.DONE and job.errors == {5: "the engine died"}
    assert sizes == [4, 4, 4, 1]


async def test_a_batch_gives_up_on_a_model_that_refuses_everything(batches: Batches) -> None:
    calls = 0

    async def embed(texts: Sequence[str]) -> list[list[float]]:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0)
        raise Refusal(Fault.ENGINE, "this model does not embed")

    job = batches.submit("m", ["a"] * 400, embed)
    await ended(batches, job.id)
    assert job.progress is JobState.FAILED and len(job.errors) == job.done == 400
    assert calls < 140
    calls = 0

    async def gone(texts: Sequence[str]) -> list[list[float]]:
        nonlocal calls
        calls += 1
        raise Refusal(Fault.NOT_FOUND, "no such model")

    job = batches.submit("m", ["a"] * 40, gone)
    await ended(batches, job.id)
    assert job.progress is JobState.FAILED and calls == 10


async def test_texts_without_a_vector_at_the_deadline_fail(batches: Batches) -> None:
    async def embed(texts: Sequence[str]) -> list[list[float]]:
        if "slow" in texts:
            await asyncio.Event().wait()
        return await lengths(texts)

    job = batches.submit("m", ["a"] * 4 + ["slow"] * 4, embed, deadline=0.2)
    await ended(batches, job.id)
    assert job.progress is JobState.DONE and set(job.errors) == {4, 5, 6, 7} and job.done == 8
    assert "0.2 s" in job.errors[4]


async def test_concurrent_pieces_are_limited(batches: Batches) -> None:
    now = most = 0

    async def embed(texts: Sequence[str]) -> list[list[float]]:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.001)
        now -= 1
        return await lengths(texts)

    jobs = [batches.submit("m", ["a"] * 40, embed) for _ in range(2)]
    for job in jobs:
        await ended(batches, job.id)
    assert most == 3


async def test_a_batch_whose_model_is_loading_does_not_delay_others(batches: Batches) -> None:
    never = asyncio.Event()

    async def load(texts: Sequence[str]) -> list[list[float]]:
        await never.wait()
        return []

    loading = batches.submit("m", ["a"] * 40, load)
    await asyncio.sleep(0)
    other = batches.submit("n", ["a"] * 40, lengths)
    await ended(batches, other.id)
    assert other.progress is JobState.DONE and loading.progress is JobState.RUNNING


async def test_a_running_batch_can_be_cancelled(batches: Batches) -> None:
    first = asyncio.Event()

    async def embed(texts: Sequence[str]) -> list[list[float]]:
        if first.is_set():
            await asyncio.Event().wait()
        first.set()
        return await lengths(texts)

    job = batches.submit("m", ["a"] * 40, embed)
    await first.wait()
    await batches.cancel(job.id)
    assert job.progress is JobState.CANCELLED and job.ended
    at_once = batches.submit("m", ["a"] * 40, embed)
    await batches.cancel(at_once.id)
    assert at_once.progress is JobState.CANCELLED
    with pytest.raises(Refusal):
        await batches.cancel("none")


async def test_only_the_newest_results_are_kept(batches: Batches) -> None:
    async def wide(texts: Sequence[str]) -> list[list[float]]:
        return [[1.0] * 100 for _ in texts]

    ids = []
    for _ in range(8):
        job = batches.submit("m", ["a"] * 5, wide)
        ids.append(job.id)
        await ended(batches, job.id)
    assert [job.id for job in batches.jobs()] == list(reversed(ids[-2:]))
    with pytest.raises(Refusal) as refused:
        batches.submit("m", ["a"] * (LARGEST + 1), wide)
    assert refused.value.fault is Fault.BAD_REQUEST


async def test_vectors_of_running_batches_count_towards_the_limit(batches: Batches) -> None:
    go = asyncio.Event()

    async def wide(texts: Sequence[str]) -> list[list[float]]:
        if len(texts) < 4:
            await go.wait()
        return [[1.0] * 100 for _ in texts]

    first = batches.submit("m", ["a"] * 9, wide)
    await until(lambda: first.done >= 8, 5)
    # The limit is 1000 numbers, and the first batch has or reserves 900.
    second = batches.submit("m", ["a"] * 4, wide)
    await ended(batches, second.id)
    assert second.progress is JobState.FAILED and second.vectors == [None] * 4
    assert "4 vectors of 100 dimensions do not fit" in second.errors[0]
    go.set()
    await ended(batches, first.id)
    assert first.progress is JobState.DONE and not first.errors


async def test_texts_of_running_batches_are_bounded() -> None:
    batches = Batches(characters=100)

    async def never(texts: Sequence[str]) -> list[list[float]]:
        await asyncio.Event().wait()
        return []

    try:
        running = batches.submit("m", ["a" * 60], never)
        with pytest.raises(Refusal) as refused:
            batches.submit("m", ["a" * 41], never)
        assert refused.value.fault is Fault.UNAVAILABLE and refused.value.retry_after > 0
        await batches.cancel(running.id)
        batches.submit("m", ["a" * 100], never)
    finally:
        await batches.close()


async def test_too_many_running_batches_are_refused(batches: Batches) -> None:
    async def never(texts: Sequence[str]) -> list[list[float]]:
        await asyncio.Event().wait()
        return []

    for _ in range(2):
        batches.submit("m", ["a"], never)
    with pytest.raises(Refusal) as refused:
        batches.submit("m", ["a"], never)
    assert refused.value.fault is Fault.UNAVAILABLE and refused.value.retry_after > 0


class EmbeddingService:
    """Returns the length of each text as its vector."""

    def __init__(self) -> None:
        self.asks: list[Ask] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def open(self, ask: Ask, on_wait: Any) -> Answer:
        self.asks.append(ask)
        await self.gate.wait()
        return Answer(routing(), singly(self._play(ask.calls[Engine.LLAMA])))

    async def _play(self, call: Call) -> AsyncIterator[bytes]:
        rows = ",".join(
            f'{{"index":{place},"embedding":[{len(text)},0.0]}}'
            for place, text in enumerate(call.body["input"])
        )
        yield f'{{"data":[{rows}],"usage":{{"prompt_tokens":1}}}}'.encode()


async def ended_job(http: ClientSession, url: str, id_: str) -> dict[str, Any]:
    """Wait until the job has ended."""
    async with asyncio.timeout(5):
        while True:
            async with http.get(f"{url}/api/batch/jobs/{id_}") as answer:
                job: dict[str, Any] = await answer.json()
            if job["status"] != "running":
                return job
            await asyncio.sleep(0.01)


async def test_a_batch_over_http(serve: Serve, http: ClientSession) -> None:
    service = EmbeddingService()
    url = await serve(parts(service, model("embed:latest", capabilities=("embedding",))))
    texts = ["x" * (1 + count % 7) for count in range(100)]
    async with http.post(f"{url}/api/batch/embed", json={"model": "embed", "input": texts}) as answer:
        assert answer.status == 202
        job = await answer.json()
    assert job["total"] == 100
    job = await ended_job(http, url, job["job_id"])
    assert (job["status"], job["completed"], job["progress"]) == ("completed", 100, 1.0)
    assert len({ask.id for ask in service.asks}) == len(service.asks) == 4
    assert all(ask.priority == 1 and ask.embedding for ask in service.asks)
    async with http.get(f"{url}/api/batch/results/{job['job_id']}?offset=90&limit=5") as answer:
        page = await answer.json()
    assert page["embeddings"] == [[1.0, 0.0]] * 5 and page["next_offset"] == 95
    # A program that follows next_offset would never end.
    async with http.get(f"{url}/api/batch/results/{job['job_id']}?limit=0") as answer:
        assert answer.status == 400 and "at least 1" in await answer.text()
    async with http.get(f"{url}/api/batch/jobs") as answer:
        assert [listed["job_id"] for listed in (await answer.json())["jobs"]] == [job["job_id"]]
    async with http.delete(f"{url}/api/batch/jobs/{job['job_id']}") as answer:
        assert (await answer.json())["status"] == "completed"
    async with http.get(f"{url}/api/batch/jobs/none") as answer:
        assert answer.status == 404
    wrong: dict[str, Any]
    for wrong in ({"input": []}, {"input": ["a"], "timeout": "soon"}):
        async with http.post(f"{url}/api/batch/embed", json={"model": "embed", **wrong}) as answer:
            assert answer.status == 400


async def test_a_batch_fails_at_its_timeout(serve: Serve, http: ClientSession) -> None:
    service = EmbeddingService()
    service.gate.clear()
    url = await serve(parts(service, model("embed:latest", capabilities=("embedding",))))
    body = {"model": "embed", "input": ["a", "b"], "timeout": "100ms"}
    async with http.post(f"{url}/api/batch/embed", json=body) as answer:
        job = await answer.json()
    job = await ended_job(http, url, job["job_id"])
    assert (job["status"], job["failed"]) == ("failed", 2)


async def test_a_batch_ends_when_its_key_is_revoked(
    serve: Serve, http: ClientSession, tmp_path: Path
) -> None:
    keys = Keys(FakeView(record("0" * 16)), FakeCalls("0" * 16, {}), tmp_path / "keys.json")
    service = EmbeddingService()
    service.gate.clear()
    services = parts(service, model("embed:latest", capabilities=("embedding",)), keys=keys)
    url = await serve(services, trusted_proxies=TRUSTED_PROXIES)
    _, secret = await keys.create("laptop", Scope.INFER)
    headers = {"X-Forwarded-For": "192.168.1.77", "X-Api-Key": secret}
    body = {"model": "embed", "input": ["a"] * 2000}
    async with http.post(f"{url}/api/batch/embed", json=body, headers=headers) as answer:
        job = await answer.json()
    await until(lambda: service.asks)
    await keys.revoke("laptop")
    service.gate.set()
    job = await ended_job(http, url, job["job_id"])
    assert len(service.asks) <= 8 and job["failed"] >= 2000 - 8 * 32
    async with http.get(f"{url}/api/batch/results/{job['job_id']}?offset=1990") as answer:
        assert "the API key was revoked" in (await answer.json())["errors"]["1999"]
