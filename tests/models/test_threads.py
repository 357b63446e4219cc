"""Threads for work that blocks."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

from sollold.models.stores.threads import behind_others, in_thread


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


async def test_threads_that_copy_much_leave_the_processor_to_others() -> None:
    before = niceness()
    with ThreadPoolExecutor(1, initializer=behind_others) as threads:
        assert await in_thread(threads, niceness) == max(before, 10)
    assert niceness() == before
