"""Threads for work that blocks."""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor

from sollold.models.stores.threads import in_thread, lower_priority


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


async def test_copying_threads_run_at_a_lower_priority() -> None:
    before = niceness()
    with ThreadPoolExecutor(1, initializer=lower_priority) as threads:
        assert await in_thread(threads, niceness) == max(before, 10)
    assert niceness() == before


async def test_work_that_is_cancelled_again_has_ended_when_its_caller_goes_on() -> None:
    began, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        may_end.wait(10)
        ended.set()

    with ThreadPoolExecutor(1) as threads:
        task = asyncio.create_task(in_thread(threads, work))
        await asyncio.to_thread(began.wait, 10)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0)
        assert not task.done()
        may_end.set()
        await asyncio.wait({task})
    assert task.cancelled()
    assert ended.is_set()
