"""Reads that share threads, when the files of some of them do not answer."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sollold.models.stores.patient_threads import PatientThreads
from sollold.models.transfer import peer_source
from tests.doubles import until
from tests.models.pulling import ThreeNodes, big

MOST = 2


@pytest.fixture
def server_away() -> Iterator[threading.Event]:
    """Set when the server of the share is back."""
    back = threading.Event()
    yield back
    back.set()


async def test_reads_that_hang_take_no_thread_from_those_of_other_folders(
    server_away: threading.Event,
) -> None:
    threads = PatientThreads(MOST, "test", seconds=0.2)
    hung = [asyncio.create_task(threads.run("/share/a", server_away.wait)) for _ in range(5 * MOST)]
    for one in await asyncio.gather(*hung, return_exceptions=True):
        assert isinstance(one, LookupError) and "/share does not answer" in str(one)
    assert sum(one.name.startswith("test") for one in threading.enumerate()) == MOST
    assert await threads.run("/disk/a", lambda: "read") == "read"
    with pytest.raises(LookupError):
        await threads.run("/share/b", lambda: "read")
    server_away.set()
    async with asyncio.timeout(10):
        while True:
            try:
                assert await threads.run("/share/b", lambda: "read") == "read"
                break
            except LookupError:
                await asyncio.sleep(0.01)
    threads.close()


async def test_whoever_goes_leaves_no_thread_behind_that_is_not_counted(server_away: threading.Event) -> None:
    threads = PatientThreads(MOST, "test", seconds=0.2)
    for _ in range(5):
        gone = asyncio.create_task(threads.run("/share/a", server_away.wait))
        await asyncio.sleep(0)
        await asyncio.sleep(0.05)
        gone.cancel()
    with pytest.raises(LookupError):
        await threads.run("/share/a", lambda: "read")
    assert sum(one.name.startswith("test") for one in threading.enumerate()) <= MOST
    assert await threads.run("/disk/a", lambda: "read") == "read"
    threads.close()


async def test_no_further_threads_stay_once_reads_that_hung_have_ended(server_away: threading.Event) -> None:
    threads = PatientThreads(MOST, "test", seconds=0.2)
    with pytest.raises(LookupError):
        await threads.run("/share/a", server_away.wait)
    together = threading.Barrier(MOST, timeout=10)
    reads = [threads.run(f"/disk{place}/a", together.wait) for place in range(MOST)]
    assert sorted(await asyncio.gather(*reads)) == [*range(MOST)]
    server_away.set()
    await until(lambda: sum(one.name.startswith("test") for one in threading.enumerate()) == MOST)
    threads.close()


async def test_a_share_whose_server_is_away_holds_up_no_transfer_of_other_models(
    three: ThreeNodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server_away: threading.Event
) -> None:
    a, b, _ = three.nodes
    a.folder.joinpath("m/share").mkdir(parents=True)
    hung = big(a.folder / "m" / "share" / "hung.gguf", seed=1)
    big(a.folder / "m" / "well.gguf", seed=2)
    await three.start()
    await until(lambda: b.library.find("hung") and b.library.find("well"))
    read = peer_source._read

    def hangs(path: str, *args: object) -> bytes:
        if path == str(hung):
            server_away.wait()
        return read(path, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(peer_source, "_read", hangs)
    a.sender._threads = PatientThreads(1, "send", seconds=0.5)
    waiting = asyncio.create_task(b.pull("hung"))
    async with asyncio.timeout(20):
        lines = await b.pull("well")
    assert lines[-1].get("status") == "success", lines
    server_away.set()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


async def test_a_read_that_fails_is_told_to_its_caller_and_to_nobody_else(tmp_path: Path) -> None:
    told: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context))
    threads = PatientThreads(MOST, "test")
    with pytest.raises(FileNotFoundError):
        await threads.run(tmp_path / "gone", (tmp_path / "gone").read_bytes)
    threads.close()
    for _ in range(3):
        gc.collect()
        await asyncio.sleep(0)
    assert told == []
