"""`sollold chat` on a terminal."""

from __future__ import annotations

import asyncio

from aiohttp import web

from tests.cli.terminal import TerminalCommand
from tests.http_double import HttpDouble


def test_ctrl_c_twice_ends_a_conversation_that_waits_for_input() -> None:
    command = TerminalCommand("chat", "any", "--node", "127.0.0.1:9")
    try:
        command.read_until(lambda: b">>> " in command.output)
        command.press_ctrl_c()
        command.read_until(lambda: command.output.count(b">>> ") > 1)
        assert b"/bye" in command.output
        command.press_ctrl_c()
        assert command.exit_status() == 130
    finally:
        command.close()


async def test_a_conversation_with_a_model_without_a_chat_template_begins_with_a_note() -> None:
    async def show(request: web.Request) -> web.Response:
        return web.json_response({"note": "no chat template"})

    app, daemon = web.Application(), HttpDouble()
    app.router.add_post("/api/show", show)
    command = TerminalCommand("chat", "base", "--node", await daemon.serve(app))
    try:
        await asyncio.to_thread(command.read_until, lambda: b">>> " in command.output)
        assert b"Talking with base. It has no chat template. Ctrl-C stops an answer" in command.output
    finally:
        command.close()
        await daemon.close()
