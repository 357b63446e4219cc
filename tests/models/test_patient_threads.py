"""Reads in shared threads when some files' storage hangs."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sollold.models.stores import patient_read
from sollold.models.stores.patient_threads import PatientThreads
from sollold.models.transfer import peer_source
from tests.doubles import until
from tests.models.pulling import ThreeNodes, big

MAX_THREADS = 2


@pytest.fixture
def share_answers() -> Iterator[threading.Event]:
    """An event that ends the hanging reads of a share."""
    answers = threading.Event()
    yield answers
    answers.set()


async def test_hanging_reads_do_not_block_reads_of_other_folders(
    share_answers: threading.Event,
) -> None:
    threads = PatientThreads(MAX_THREADS, "test", seconds=0.2)
    hung = [asyncio.create_task(threads.run("/share/a", share_answers.wait)) for _ in range(5 * MAX_THREADS)]
    for error in await asyncio.gather(*hung, return_exceptions=True):
        assert isinstance(error, LookupError) and "/share does not answer" in str(error)
    assert sum(thread.name.startswith("test") for thread in threading.enumerate()) == MAX_THREADS
    assert await threads.run("/disk/a", lambda: "read") == "read"
    with pytest.raises(LookupError):
        await threads.run("/share/b", lambda: "read")
    share_answers.set()
    async with asyncio.timeout(10):
        while True:
            try:
                assert await threads.run("/share/b", lambda: "read") == "read"
                break
            except LookupError:
                await asyncio.sleep(0.01)
    threads.close()


async def test_threads_of_cancelled_reads_count_towards_the_limit(share_answers: threading.Event) -> None:
    threads = PatientThreads(MAX_THREADS, "test", seconds=0.2)
    for _ in range(5):
        reading = asyncio.create_task(threads.run("/share/a", share_answers.wait))
        await asyncio.sleep(0)
        await asyncio.sleep(0.05)
        reading.cancel()
    with pytest.raises(LookupError):
        await threads.run("/share/a", lambda: "read")
    assert sum(thread.name.startswith("test") for thread in threading.enumerate()) <= MAX_THREADS
    assert await threads.run("/disk/a", lambda: "read") == "read"
    threads.close()


async def test_additional_threads_end_after_hanging_reads_have_ended(share_answers: threading.Event) -> None:
    threads = PatientThreads(MAX_THREADS, "test", seconds=0.2)
    with pytest.raises(LookupError):
        await threads.run("/share/a", share_answers.wait)
    barrier = threading.Barrier(MAX_THREADS, timeout=10)
    reads = [threads.run(f"/disk{number}/a", barrier.wait) for number in range(MAX_THREADS)]
    assert sorted(await asyncio.gather(*reads)) == [*range(MAX_THREADS)]
    share_answers.set()
    await until(
        lambda: sum(thread.name.startswith("test") for thread in threading.enumerate()) == MAX_THREADS
    )
    threads.close()


async def test_idle_threads_end(share_answers: threading.Event) -> None:
    threads = PatientThreads(MAX_THREADS, "test")
    reading = asyncio.create_task(threads.run("/share/a", share_answers.wait))
    assert await threads.run("/disk/a", lambda: "read") == "read"
    threads.end_idle()
    share_answers.set()
    assert await reading
    assert any(thread.name.startswith("test") for thread in threading.enumerate())
    threads.end_idle()
    await until(lambda: not any(thread.name.startswith("test") for thread in threading.enumerate()))
    assert await threads.run("/disk/a", lambda: "read again") == "read again"
    threads.close()


async def test_a_hanging_share_does_not_delay_transfers_of_other_models(
    three: ThreeNodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share_answers: threading.Event
) -> None:
    a, b, _ = three.nodes
    a.folder.joinpath("m/share").mkdir(parents=True)
    hung = big(a.folder / "m" / "share" / "hung.gguf", seed=1)
    big(a.folder / "m" / "well.gguf", seed=2)
    await three.start()
    await until(lambda: b.library.find("hung") and b.library.find("well"))
    read = peer_source._read

    def hangs(path: str, *args: Any) -> bytes:
        if path == str(hung):
            share_answers.wait()
        return read(path, *args)

    monkeypatch.setattr(peer_source, "_read", hangs)
    a.sender._threads = PatientThreads(1, "send", seconds=0.5)
    waiting = asyncio.create_task(b.pull("hung"))
    async with asyncio.timeout(20):
        lines = await b.pull("well")
    assert lines[-1].get("status") == "success", lines
    share_answers.set()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


async def test_a_failed_read_is_reported_only_to_its_caller(tmp_path: Path) -> None:
    reports: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: reports.append(context))
    threads = PatientThreads(MAX_THREADS, "test")
    with pytest.raises(FileNotFoundError):
        await threads.run(tmp_path / "gone", (tmp_path / "gone").read_bytes)
    threads.close()
    for _ in range(3):
        gc.collect()
        await asyncio.sleep(0)
    assert reports == []


@pytest.mark.parametrize("turns", [0, 1])
async def test_a_cancellation_in_the_moment_of_the_answer_is_not_lost(
    monkeypatch: pytest.MonkeyPatch, turns: int
) -> None:
    answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    monkeypatch.setattr(patient_read, "in_own_thread", lambda work, name: answer)
    reading = asyncio.create_task(patient_read.read_patiently(lambda: 1, "/share/a"))
    for _ in range(3):
        await asyncio.sleep(0)
    answer.set_result(1)
    for _ in range(turns):
        await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
