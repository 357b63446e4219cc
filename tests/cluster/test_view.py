"""Waiting for a change of the view."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from sollold.cluster.net.view import next_change, wait_until


class _Source:
    def __init__(self) -> None:
        self.callbacks: list[Callable[[], None]] = []

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        self.callbacks.append(callback)
        return lambda: self.callbacks.remove(callback)

    def change(self) -> None:
        for callback in tuple(self.callbacks):
            callback()


async def test_a_change_ends_the_wait_at_once() -> None:
    source = _Source()
    waiting = asyncio.ensure_future(next_change(source, 60.0))
    await asyncio.sleep(0)
    assert source.callbacks
    source.change()
    await asyncio.wait_for(waiting, 5)
    assert not source.callbacks


async def test_without_a_change_the_wait_ends_at_its_limit() -> None:
    source = _Source()
    await asyncio.wait_for(next_change(source, 0.01), 5)
    assert not source.callbacks


async def test_a_condition_is_checked_before_and_after_each_change() -> None:
    source = _Source()
    await asyncio.wait_for(wait_until(source, lambda: True), 5)
    values = [False, False, True]
    waiting = asyncio.ensure_future(wait_until(source, lambda: values.pop(0)))
    await asyncio.sleep(0)
    source.change()
    await asyncio.sleep(0)
    source.change()
    await asyncio.wait_for(waiting, 5)
    assert not values and not source.callbacks


async def test_a_cancelled_wait_leaves_no_subscription() -> None:
    source = _Source()
    waiting = asyncio.ensure_future(wait_until(source, lambda: False))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not source.callbacks
