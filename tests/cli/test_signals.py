"""A command that is told to end, or whose terminal is closed, gives back what it holds."""

from __future__ import annotations

import asyncio
import fcntl
import os
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from sollold.cli.exit import Exit
from tests.cli.test_commands import STATE

HIDE, SHOW = b"\x1b[?25l", b"\x1b[?25h"


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
    """A node that loads, pulls and answers without end, in a thread of its own."""
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


class Typed:
    """A command on a terminal of its own."""

    def __init__(self, *words: str) -> None:
        self.ours, self.theirs = os.openpty()
        self.before = termios.tcgetattr(self.theirs)
        self.said = b""

        def take_the_terminal() -> None:
            fcntl.ioctl(self.theirs, termios.TIOCSCTTY, 0)
            for number in (signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)  # tests in the background inherit that it is ignored

        self.process = subprocess.Popen(
            [sys.executable, "-m", "sollold", *words],
            stdin=self.theirs,
            stdout=self.theirs,
            stderr=self.theirs,
            start_new_session=True,
            preexec_fn=take_the_terminal,
            env={**os.environ, "TERM": "xterm"},
        )

    def shows(self) -> bool:
        """Whether it draws on the terminal, which has no cursor meanwhile."""
        return HIDE in self.said and bool(self.said.rpartition(HIDE)[2].strip())

    def read_until(self, done: Callable[[], bool]) -> None:
        end = time.monotonic() + 30
        while not done():
            assert time.monotonic() < end, self.said
            if select.select([self.ours], [], [], 0.05)[0]:
                self.said += os.read(self.ours, 1 << 16)

    def tell(self, number: signal.Signals) -> None:
        """Send a signal when it waits: one just before that is acted on when the next bytes come only."""
        asleep = 0

        def waits() -> bool:
            nonlocal asleep
            state = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(") ")[2][0]
            asleep = asleep + 1 if state == "S" else 0
            return asleep >= 5

        self.read_until(self.shows)
        self.read_until(waits)
        self.process.send_signal(number)

    def ended(self) -> int:
        """Its exit status, when all that it said has been read."""
        self.read_until(lambda: self.process.poll() is not None)
        while select.select([self.ours], [], [], 0)[0]:
            self.said += os.read(self.ours, 1 << 16)
        return int(self.process.returncode)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(10)
        os.close(self.ours)
        os.close(self.theirs)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("words", [("top",), ("status", "--watch"), ("pull", "big"), ("load", "big")])
def test_a_terminal_is_given_back_as_it_was(url: str, words: tuple[str, ...], number: signal.Signals) -> None:
    typed = Typed("--node", url, *words)
    try:
        typed.tell(number)
        assert typed.ended() == 128 + number, typed.said[-3000:].decode()
        assert termios.tcgetattr(typed.theirs) == typed.before
        assert typed.said.rfind(SHOW) > typed.said.rfind(HIDE), "its cursor is seen again"
        assert typed.said.count(b"\x1b[?1049h") == typed.said.count(b"\x1b[?1049l"), "its screen is back"
        assert b"Traceback" not in typed.said
    finally:
        typed.close()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("load", "big"), b"the load of big continues; to cancel it: sollold unload --force big"),
        (("chat", "big", "hi"), b"the load of big continues; to cancel it: sollold unload --force big"),
        (("bench", "big"), b"the load of big continues; to cancel it: sollold unload --force big"),
        (("pull", "big"), b"the downloaded part is kept, resume with: sollold pull big"),
    ],
)
def test_what_goes_on_without_the_command_is_said(url: str, words: tuple[str, ...], said: bytes) -> None:
    typed = Typed("--node", url, *words)
    try:
        typed.tell(signal.SIGINT)
        assert typed.ended() == 130
        assert said in b" ".join(typed.said.split())
    finally:
        typed.close()


def test_a_line_for_a_program_comes_when_it_is_there(url: str) -> None:
    words = [sys.executable, "-m", "sollold", "--node", url, "pull", "big", "--json"]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=buffered)
    try:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], 30)[0], "the pull goes on, and nothing was said"
        assert b"pulling" in process.stdout.readline()
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.communicate()


def test_who_is_told_twice_ends_at_once(tmp_path: Path) -> None:
    """However long the giving back takes."""
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
def test_an_archive_that_can_not_be_written_is_named_and_what_stands_there_stays(url: str) -> None:
    words = [sys.executable, "-m", "sollold", "--node", url, "support", "-o", "/dev/full"]
    done: Any = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == Exit.FAILED
    assert done.stderr == "sollold: No space left on device: /dev/full\n"
    assert Path("/dev/full").is_char_device()


def test_no_half_archive_is_left(url: str, tmp_path: Path) -> None:
    file = tmp_path / "s.tar.gz"
    words = f"ulimit -f 1; exec {sys.executable} -m sollold --node {url} support -o {file}"
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, timeout=60)
    assert done.returncode == Exit.FAILED and str(file) in done.stderr, done.stderr
    assert not file.exists()
