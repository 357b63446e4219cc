"""Clients in programs that fork, pickle objects between processes, or have many threads."""

from __future__ import annotations

import asyncio
import copy
import multiprocessing
import pickle
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from aiohttp import web

from sollold.client import (
    ClientError,
    HybridRouter,
    InsufficientMemory,
    RequestTimeout,
    background,
    daemon_process,
    sync_wrapper,
)
from sollold.client.coordinator import DISTRIBUTED
from sollold.client.daemon_process import DaemonProcess
from sollold.client.errors import NodeLost, NodeSilent
from sollold.tasks import cancel_and_wait
from tests.doubles import until
from tests.http_double import HttpDouble


class Slow(HttpDouble):
    """A node with streams that last until `end` is set."""

    def __init__(self) -> None:
        self.open = 0
        self.end = asyncio.Event()
        self.deployments: list[dict[str, Any]] = []

    async def start(self) -> str:
        app = web.Application()
        app.router.add_get("/{path:.*}", self._whole)
        app.router.add_post("/api/chat", self._stream)
        return await self.serve(app)

    async def _whole(self, request: web.Request) -> web.Response:
        whole = {"name": "a", "models": [], "nodes": [], "deployments": self.deployments}
        return web.json_response(whole)

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        record = b'{"message":{"role":"assistant","content":"a"},"done":%b}\n'
        await response.write(record % b"false")
        self.open += 1
        await self.end.wait()
        await response.write(record % b"true")
        return response


@pytest.fixture
async def node() -> AsyncIterator[tuple[Slow, str]]:
    slow = Slow()
    url = await slow.start()
    yield slow, url
    slow.end.set()
    await slow.close()


def _in_child(pool: sync_wrapper.OllamaPool, queue: multiprocessing.Queue[object]) -> None:
    try:
        queue.put(pool.list())
    except BaseException as error:
        queue.put(repr(error))


async def test_forked_children_use_the_parents_pool(node: tuple[Slow, str]) -> None:
    _, url = node
    pool = sync_wrapper.OllamaPool(url)
    assert await asyncio.to_thread(pool.list) == []
    context = multiprocessing.get_context("fork")
    stop = threading.Event()

    def busy() -> None:
        # Hold the lock at some of the forks.
        while not stop.is_set():
            background.loop()

    def fork() -> list[object]:
        found: list[object] = []
        for _ in range(10):
            queue: multiprocessing.Queue[object] = context.Queue()
            child = context.Process(target=_in_child, args=(pool, queue))
            child.start()
            found.append(queue.get(timeout=30))
            child.join(10)
            found.append(pool.list())
        return found

    threads = [threading.Thread(target=busy) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        assert await asyncio.to_thread(fork) == [[]] * 20
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        await asyncio.to_thread(pool.close)


async def test_a_daemon_that_has_ended_is_started_again(
    node: tuple[Slow, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, url = node
    monkeypatch.setattr(daemon_process, "guarded", lambda words: ["sleep", "60"])
    monkeypatch.setattr(DaemonProcess, "_answers", lambda self: asyncio.sleep(0, False))
    monkeypatch.setattr(DaemonProcess, "_wait", lambda self: asyncio.sleep(0))
    async with HybridRouter(auto_setup_rpc=True) as router:
        child = router._child
        assert child is not None
        child._start()
        router.ollama_pool.client.nodes.add([url])
        first = child._process
        for _ in range(2):
            await router.connect()
        assert first is not None and child._process is first
        first.kill()
        await asyncio.to_thread(first.wait)
        for _ in range(2):
            await router.connect()
        second = child._process
        assert second is not None and second is not first and second.poll() is None
    assert second.poll() is not None


def test_a_daemon_is_stopped_from_another_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon_process, "guarded", lambda words: ["sleep", "60"])
    daemon = DaemonProcess(url="http://127.0.0.1:9")

    async def start() -> None:
        waiting = [asyncio.create_task(daemon.ensure()) for _ in range(2)]
        await asyncio.sleep(0.1)
        await cancel_and_wait(*waiting)

    asyncio.run(start())
    process, log = daemon._process, daemon._log
    assert process is not None and process.returncode is None
    assert log is not None and log.exists()
    asyncio.run(daemon.stop())
    assert process.returncode is not None and not log.exists()


async def test_many_concurrent_streams(node: tuple[Slow, str]) -> None:
    slow, url = node
    pool = sync_wrapper.OllamaPool(url)
    count = 120

    def read() -> int:
        return len(list(pool.chat("demo", [{"role": "user", "content": "hi"}], stream=True)))

    with ThreadPoolExecutor(count) as threads:
        loop = asyncio.get_running_loop()
        reading = [loop.run_in_executor(threads, read) for _ in range(count)]
        try:
            await until(lambda: slow.open == count, 60)
            assert await asyncio.to_thread(pool.list) == []
        finally:
            slow.end.set()
        assert await asyncio.gather(*reading) == [2] * count
    await asyncio.to_thread(pool.close)


@pytest.mark.parametrize(
    "error",
    [
        ClientError("no", 503),
        NodeLost("gone"),
        RequestTimeout("late"),
        NodeSilent("silent"),
        InsufficientMemory("big", needed=3, there=1, missing=2, remedies=("add memory",)),
    ],
)
def test_errors_survive_pickling(error: ClientError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and vars(again) == vars(error) and str(again) == str(error)


async def test_a_used_router_survives_pickling(node: tuple[Slow, str]) -> None:
    _, url = node
    async with HybridRouter(node=url, api_key="k", model_filter=["a"]) as router:
        assert await router.refresh() == []
        router.ollama_pool.client.nodes.add(["http://10.0.0.1:1"], trusted=False)
        async with pickle.loads(pickle.dumps(router)) as again:
            assert await again.refresh() == []
            assert again.ollama_pool.client.api_key == "k" and again.model_filter == ("a",)
            assert [known.trusted for known in again.ollama_pool.client.nodes] == [True, False]
    pool = sync_wrapper.OllamaPool(url)
    assert await asyncio.to_thread(pool.list) == []
    assert await asyncio.to_thread(copy.deepcopy(pool).list) == []


async def test_a_coordinator_works_after_pickling(node: tuple[Slow, str]) -> None:
    slow, url = node
    runs = {"id": "d1", "model": "big:latest", "node": "1", "node_name": "a", "state": "ready", "placed": []}
    slow.deployments = [runs | {"backend": DISTRIBUTED, "context": 768, "speed": 0.0}]
    with sync_wrapper.HybridRouter(node=url) as router:
        (found,) = await asyncio.to_thread(lambda: router.coordinators)
        again = pickle.loads(pickle.dumps(found))
        assert again == found and await asyncio.to_thread(again.is_running)
        slow.deployments = []
        assert not await asyncio.to_thread(again.is_running)
