"""Clients dropped without `close` leave nothing open that Python's development mode would report."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

import pytest

from tests.client.test_processes import Slow

PROGRAM = """
import asyncio
import gc
import sys

from sollold.client import HybridRouter, OllamaPool, sync_wrapper

node = sys.argv[1]
ask = [{"role": "user", "content": "hi"}]


class Kept:
    pass


async def fails():
    await OllamaPool(node).list()
    raise KeyError("mine")


async def fails_in_a_stream():
    async for _ in await HybridRouter(node=node).route_request("m", ask, stream=True):
        raise KeyError("mine")


def fails_blocking():
    sync_wrapper.OllamaPool(node).list()
    raise KeyError("mine")


def fails_blocking_in_a_stream():
    for _ in sync_wrapper.HybridRouter(node=node).route_request("m", ask, stream=True):
        raise KeyError("mine")
"""
KEPT = """
try:
    {call}
except KeyError as error:
    kept = error
"""
ENDS = {
    "in the traceback of an error": KEPT.format(call="asyncio.run(fails())"),
    "and this one is dropped": KEPT.format(call="asyncio.run(fails())") + "del kept\ngc.collect()",
    "by an error that ends the program": "asyncio.run(fails())",
    "in a stream": KEPT.format(call="asyncio.run(fails_in_a_stream())"),
    "used on two loops": "pool = OllamaPool(node)\nasyncio.run(pool.list())\nasyncio.run(pool.list())",
    "closed, and used again": (
        "async def main():\n    await pool.list()\n    await pool.close()\n    await pool.list()\n"
        "pool = OllamaPool(node)\nasyncio.run(main())\nasyncio.run(pool.close())"
    ),
    "in a circle, of which the collector finds the connections first": (
        "kept = Kept()\nkept.me, kept.pool = kept, sync_wrapper.OllamaPool(node)\n"
        "gc.freeze()\nkept.pool.list()\ngc.collect()\ngc.unfreeze()\n"
        "del kept\ngc.collect()"
    ),
    "blocking": KEPT.format(call="fails_blocking()"),
    "blocking, in a stream": KEPT.format(call="fails_blocking_in_a_stream()"),
    "blocking, in a circle": (
        "kept = Kept()\nkept.me, kept.pool = kept, sync_wrapper.OllamaPool(node)\nkept.pool.list()"
    ),
}


@pytest.fixture
async def node() -> AsyncIterator[str]:
    slow = Slow()
    yield await slow.start()
    slow.end.set()
    await slow.close()


@pytest.mark.parametrize("end", ENDS)
async def test_a_dropped_client_leaves_nothing_open(node: str, end: str) -> None:
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-X", "dev", "-c", PROGRAM + ENDS[end], node), stderr=asyncio.subprocess.PIPE
    )
    _, errors = await asyncio.wait_for(child.communicate(), 60)
    assert b"Warning" not in errors and b"never" not in errors, errors.decode()
    # Match the end of a traceback: asyncio's slow-callback warnings name the error too.
    assert (b"\nKeyError: " in errors) == (child.returncode != 0)
