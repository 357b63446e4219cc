"""Cancellation of tasks, and retrieval of errors that nothing awaits."""

from __future__ import annotations

import asyncio
import contextlib

from sollold.tasks import cancel_and_wait, retrieve_error


async def test_cancel_and_wait_waits_for_stubborn_and_failing_tasks() -> None:
    ended: list[str] = []

    async def stubborn() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        await asyncio.sleep(0)
        ended.append("late")

    async def failing() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            raise ValueError

    tasks = [asyncio.create_task(stubborn()), asyncio.create_task(failing())]
    await asyncio.sleep(0)
    await cancel_and_wait(*tasks, None)
    assert all(task.done() for task in tasks) and ended == ["late"]
    await cancel_and_wait(*tasks)
    await cancel_and_wait()


async def test_retrieved_errors_are_not_reported_as_never_retrieved() -> None:
    reported: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))

    async def fail() -> None:
        raise ValueError

    for cancelled in (False, True):
        task = asyncio.create_task(fail())
        task.add_done_callback(retrieve_error)
        if cancelled:
            task.cancel()
        await asyncio.wait([task])
        del task
    assert not reported
