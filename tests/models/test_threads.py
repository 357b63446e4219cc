"""Threads for work that blocks."""

from __future__ import annotations

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
