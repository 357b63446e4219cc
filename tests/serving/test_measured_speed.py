"""The speed published in the record: measured over complete answers without concurrent requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from sollold.cluster.gossip.record import Backend, Endpoint, State
from sollold.serving.endpoint_server import EndpointServer
from sollold.serving.protocol import EngineRequest
from sollold.settings.schema import ServingSettings
from tests.doubles import FakeView, record, until
from tests.http_double import HttpDouble
from tests.serving.cluster_double import FakeEngines


class Bench(HttpDouble):
    """An endpoint with an engine that reports the token count and speed given in each request."""

    def __init__(self) -> None:
        self.view = FakeView(record("a"))
        self.engines = FakeEngines(self.view)
        self.server = EndpointServer(self.view, self.engines, ServingSettings())
        self.go = asyncio.Event()
        self.count = 0

    async def start(self) -> None:
        app = web.Application()
        app.router.add_post("/v1/completions", self._engine)
        self.engines.urls["d"] = await self.serve(app)
        self.view.update_me(endpoints=(Endpoint("d", "m", "x", Backend.LOCAL, State.READY, slots=4),))
        await self.server.start()

    async def close(self) -> None:
        await self.server.close()
        await super().close()

    async def _engine(self, request: web.Request) -> web.Response:
        tokens, speed = (await request.text()).split()
        await self.go.wait()
        text = f'{{"timings":{{"predicted_n":{tokens},"predicted_ms":1.5,"predicted_per_second":{speed}}}}}'
        return web.Response(text=text)

    async def answer(self, tokens: int, speed: float) -> None:
        self.count += 1
        request = EngineRequest(str(self.count), "d", "/v1/completions", f"{tokens} {speed}".encode())
        stream = self.server.stream(request)
        try:
            await stream.open(lambda place: None)
            assert await stream.pour(lambda _: True)
        finally:
            await stream.close()

    async def published(self) -> float:
        """Return the speed that is published next."""
        self.engines.reports.clear()
        await until(lambda: self.engines.reports)
        return self.engines.reports[-1][3]


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    await made.start()
    yield made
    await made.close()


async def test_the_watchdog_is_idle_without_requests(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[float] = []
    monkeypatch.setattr(bench.server._peer_requests, "check", checked.append)
    await until(lambda: bool(bench.server._work._waiters))
    before = len(checked)
    bench.go.set()
    await bench.answer(100, 40.0)
    await until(lambda: len(checked) > before)


async def test_short_answers_give_no_speed(bench: Bench) -> None:
    bench.go.set()
    await bench.answer(15, 900.0)
    assert await bench.published() == 0.0
    await bench.answer(16, 40.0)
    assert await bench.published() == 40.0


async def test_concurrent_streams_give_no_initial_speed(bench: Bench) -> None:
    both = asyncio.gather(bench.answer(100, 12.0), bench.answer(100, 11.0))
    await until(lambda: any(report[1] == 2 for report in bench.engines.reports))
    bench.go.set()
    await both
    assert await bench.published() == 0.0
    await bench.answer(100, 40.0)
    assert await bench.published() == 40.0


async def test_later_answers_change_the_speed_gradually(bench: Bench) -> None:
    bench.go.set()
    await bench.answer(100, 40.0)
    await bench.answer(100, 50.0)
    assert await bench.published() == pytest.approx(43.0)
