"""Ctrl-C ends ``sollold bench`` regardless of the length of the answers."""

from __future__ import annotations

import asyncio
import signal
import sys

from aiohttp import web

from tests.http_double import HttpDouble


async def test_ctrl_c_ends_it_during_an_answer() -> None:
    responses: asyncio.Queue[web.StreamResponse] = asyncio.Queue()

    async def generate(request: web.Request) -> web.StreamResponse:
        if not (await request.json()).get("stream", True):
            return web.json_response({"done": True})
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        await response.write(b'{"response": "a"}\n')
        responses.put_nowait(response)
        await asyncio.Event().wait()
        return response

    app = web.Application()
    app.router.add_post("/api/generate", generate)
    node = HttpDouble()
    url = await node.serve(app)
    words = ("-m", "sollold", "--node", url, "bench", "m", "--callers", "2")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *words,
        stderr=asyncio.subprocess.DEVNULL,
        # Background jobs inherit an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        for _ in range(2):
            await asyncio.wait_for(responses.get(), 30)
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), 30) == 130
    finally:
        if process.returncode is None:
            process.kill()
        await node.close()
