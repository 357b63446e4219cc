"""Commands that follow a node survive its restart."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web

from sollold.cli import following
from sollold.cli.events import events
from sollold.cli.following import Follower
from sollold.cli.logs import logs
from sollold.cli.status import status
from sollold.client.errors import ClientError
from tests.http_double import HttpDouble

STATE = {
    "nodes": [],
    "deployments": [],
    "offline": [],
    "open": False,
    "leader": "",
    "leader_name": "",
    "leader_url": "",
    "me": "",
    "name": "",
}


class _Restarted:
    """A node that closes each connection after one answer and fails every third request."""

    def __init__(self, enough: int) -> None:
        self._enough = enough
        self.asked: list[str] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.query_string)
        count = len(self.asked)
        if count % 3 == 0:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if count >= self._enough:
            return web.json_response({"error": "enough"}, status=403)
        if request.path == "/api/cluster":
            return web.json_response({**STATE, "term": 1, "leader_name": f"n{count}"})
        if request.path.startswith("/api/cluster/logs"):
            log = {"deployment": "d", "node": "n", "process": "p", "reason": "", "text": f"line {count}"}
            return web.json_response({"logs": [log]})
        if request.path == "/health":
            return web.json_response({"status": "ok"})
        item = {"id": count, "time": 0, "kind": "node.joined", "message": f"event {count}"}
        return web.Response(
            text=f"id: {count}\ndata: {json.dumps(item)}\n\n", content_type="text/event-stream"
        )


@pytest.mark.parametrize(
    "command, more, words",
    [
        (events, {"follow": True}, ("event 2", "event 5")),
        (logs, {"model": "m", "follow": True, "lines": 5}, ("line 1", "line 4")),
        (status, {"watch": True}, ("leader n1", "leader n4")),
    ],
)
async def test_following_continues_after_a_node_was_offline(
    command: Callable[[argparse.Namespace], int],
    more: dict[str, Any],
    words: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(following, "PAUSE", 0.0)
    node = _Restarted(enough=7)
    app = web.Application()
    app.router.add_get("/{path:.*}", node.answer)
    server = HttpDouble()
    url = await server.serve(app)
    try:
        options = argparse.Namespace(node=url, json=False, **more)
        with pytest.raises(ClientError, match="enough"):
            await asyncio.to_thread(command, options)
    finally:
        await server.close()
    captured = capsys.readouterr()
    for text in words:
        assert text in captured.out
    assert "trying again until Ctrl-C" in captured.err and "the node responds again" in captured.err
    if command is events:
        assert [query for query in node.asked if query][:2] == ["follow=1", "follow=1&after=2"]


@pytest.mark.parametrize("words", [("events", "--follow"), ("logs", "m", "--follow")])
async def test_following_ends_with_its_reader_without_new_output(words: tuple[str, ...]) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path.startswith("/api/cluster/logs"):
            log = {"deployment": "d", "node": "n", "process": "p", "reason": "", "text": "one"}
            return web.json_response({"logs": [log]})
        if request.path == "/health":
            return web.json_response({"status": "ok"})
        events = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await events.prepare(request)
        item = {"id": 1, "time": 0, "kind": "node.joined", "message": "one"}
        await events.write(f"id: 1\ndata: {json.dumps(item)}\n\n".encode())
        await asyncio.Event().wait()
        return events

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    server = HttpDouble()
    url = await server.serve(app)
    reader, writer = os.pipe()
    command = None
    try:
        command = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "sollold", *words, "--node", url),
            stdout=writer,
            stderr=asyncio.subprocess.PIPE,
        )
        os.close(writer)
        assert await asyncio.to_thread(os.read, reader, 3)
        os.close(reader)
        _, errors = await asyncio.wait_for(command.communicate(), 60)
        assert (command.returncode, errors) == (0, b"")
    finally:
        if command is not None and command.returncode is None:
            command.kill()
        await server.close()


def test_a_node_that_never_answered_is_not_retried() -> None:
    def fail() -> None:
        raise ClientError("no daemon answers", 0)

    with pytest.raises(ClientError):
        Follower().ask(fail)
