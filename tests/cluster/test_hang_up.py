"""Clients that disconnect before their response begins cause no error in the log."""

from __future__ import annotations

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from sollold.cluster.net.hang_up import quiet_hang_up


async def fetch(fault: bool) -> None:
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


async def test_a_client_that_disconnected_is_not_logged_as_an_error(caplog: pytest.LogCaptureFixture) -> None:
    await fetch(fault=False)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_connection_error_of_the_handler_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    await fetch(fault=True)
    assert "another program's" in caplog.text
