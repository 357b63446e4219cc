"""Whoever hangs up before his answer begins leaves no error in the log."""

from __future__ import annotations

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from sollold.cluster.net.hang_up import quiet_hang_up


async def ask(fault: bool) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        if fault:
            raise ConnectionRefusedError("another program's")
        request.transport.abort()
        response = web.StreamResponse()
        await response.prepare(request)
        return response

    app = web.Application(middlewares=[quiet_hang_up])
    app.router.add_get("/", handler)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        try:
            async with session.get(server.make_url("/")) as answer:
                assert answer.status == 500
        except aiohttp.ServerDisconnectedError:
            assert not fault


async def test_a_caller_that_is_gone_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    await ask(fault=False)
    assert not [one for one in caplog.records if one.levelname == "ERROR"]


async def test_a_broken_connection_of_our_own_is_one(caplog: pytest.LogCaptureFixture) -> None:
    await ask(fault=True)
    assert "another program's" in caplog.text
