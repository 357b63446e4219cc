"""Commands clean up when they are terminated or their terminal is closed."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from sollold.cli.exit import Exit
from tests.cli.terminal import HIDE, SHOW, TerminalCommand
from tests.cli.test_commands import STATE


async def _never(request: web.Request) -> web.StreamResponse:
    await asyncio.Event().wait()
    return web.Response()


async def _pulling(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(b'{"status": "pulling", "digest": "d", "total": 9, "completed": 1}\n')
    return await _never(request)


async def _drained(request: web.Request) -> web.StreamResponse:
    return web.json_response({"node": "anna"})


async def _state(request: web.Request) -> web.StreamResponse:
    return web.json_response({**STATE, "requests": []})


async def _history(request: web.Request) -> web.StreamResponse:
    return web.json_response({"total": {"tokens_per_second": []}})


async def _no_events(request: web.Request) -> web.StreamResponse:
    return web.Response(content_type="text/event-stream")


@pytest.fixture
def url() -> Iterator[str]:
    """Run a node with endless loads, pulls and answers in a separate thread, and yield its URL."""
    app = web.Application()
    app.router.add_post("/api/cluster/load", _never)
    app.router.add_post("/api/chat", _never)
    app.router.add_post("/api/generate", _never)
    app.router.add_post("/api/show", _drained)
    app.router.add_post("/api/pull", _pulling)
    app.router.add_get("/api/cluster", _state)
    app.router.add_get("/api/cluster/history", _history)
    app.router.add_get("/api/cluster/events", _no_events)
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(app, shutdown_timeout=0.1)

    async def start() -> str:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    async def end() -> None:
        await runner.cleanup()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    found = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield found
    asyncio.run_coroutine_threadsafe(end(), loop).result(30)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(30)
    loop.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("words", [("top",), ("status", "--watch"), ("pull", "big"), ("load", "big")])
def test_the_terminal_is_restored(url: str, words: tuple[str, ...], number: signal.Signals) -> None:
    command = TerminalCommand("--node", url, *words)
    try:
        command.send(number)
        assert command.exit_status() == 128 + number, command.output[-3000:].decode()
        assert termios.tcgetattr(command.tty) == command.before
        assert command.output.rfind(SHOW) > command.output.rfind(HIDE), "the cursor is visible again"
        assert command.output.count(b"\x1b[?1049h") == command.output.count(b"\x1b[?1049l"), (
            "the alternate screen is closed"
        )
        assert b"Traceback" not in command.output
    finally:
        command.close()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("load", "big"), b"the load of big continues; to cancel it: sollold unload --force big"),
        (("chat", "big", "hi"), b"the load of big continues; to cancel it: sollold unload --force big"),
        (("bench", "big"), b"the load of big continues; to cancel it: sollold unload --force big"),
        (("pull", "big"), b"the downloaded part is kept, resume with: sollold pull big"),
    ],
)
def test_an_interrupted_command_reports_what_continues(
    url: str, words: tuple[str, ...], message: bytes
) -> None:
    command = TerminalCommand("--node", url, *words)
    try:
        command.send(signal.SIGINT)
        assert command.exit_status() == 130
        assert message in b" ".join(command.output.split())
    finally:
        command.close()


def test_json_lines_are_flushed_immediately(url: str) -> None:
    words = [sys.executable, "-m", "sollold", "--node", url, "pull", "big", "--json"]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=buffered)
    try:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], 30)[0], "the pull runs but nothing was printed"
        assert b"pulling" in process.stdout.readline()
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.communicate()


def test_a_second_signal_ends_the_process_immediately(tmp_path: Path) -> None:
    """Cleanup is not awaited."""
    code = (
        "import time\n"
        "from sollold.cli.signals import end_in_order\n"
        "end_in_order()\n"
        "try:\n"
        "    print('ready', flush=True); time.sleep(60)\n"
        "finally:\n"
        "    print('ending', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        process.terminate()
        assert process.stdout.readline() == b"ending\n"
        process.terminate()
        assert process.wait(30) == -signal.SIGTERM
    finally:
        process.kill()
        process.communicate()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_an_unwritable_archive_is_reported_and_its_target_kept(url: str) -> None:
    words = [sys.executable, "-m", "sollold", "--node", url, "support", "-o", "/dev/full"]
    done: Any = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == Exit.FAILED
    assert done.stderr == "sollold: No space left on device: /dev/full\n"
    assert Path("/dev/full").is_char_device()


def test_no_partial_archive_is_left(url: str, tmp_path: Path) -> None:
    file = tmp_path / "s.tar.gz"
    words = f"ulimit -f 1; exec {sys.executable} -m sollold --node {url} support -o {file}"
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, timeout=60)
    assert done.returncode == Exit.FAILED and str(file) in done.stderr, done.stderr
    assert not file.exists()
