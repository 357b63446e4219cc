"""A service that calls real llama-servers directly, without a cluster, so that tests see real events."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from sollold.cluster.net.pieces import sendable
from sollold.engines.address import EngineAddress
from sollold.serving.engine_error import engine_refusal
from sollold.serving.request import Answer, Ask, Engine, Waiting
from tests.api.api_parts import routing, singly
from tests.doubles import free_port


class LlamaServer:
    """A llama-server on a free port, as a context manager."""

    def __init__(
        self, binary: Path | str, file: Path, *arguments: str, context: int = 1024, slots: int = 2
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [
            "-m",
            str(file),
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "-c",
            str(context * slots),
        ]
        command += ["-np", str(slots), "-fit", "off", "--cache-ram", "0", "-t", "1", "--jinja", *arguments]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        self._process = subprocess.Popen([str(binary), *command], stdout=self._log, stderr=self._log)

    @property
    def exit_code(self) -> int | None:
        """Negative if a signal ended it; None while it runs."""
        return self._process.poll()

    def __enter__(self) -> LlamaServer:
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                    if answer.status == 200:
                        return
            time.sleep(0.05)
        raise RuntimeError("llama-server did not start")

    def __exit__(self, *_: Any) -> None:
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


class DirectService:
    """Sends each request to the llama-server of its model, after a simulated load of ``delay`` seconds.

    ``key``: API key of the llama-servers.
    """

    def __init__(self, urls: dict[str, str], delay: float = 0.0, key: str = "") -> None:
        self.urls = urls
        self.key = key
        self.delay = delay

    async def open(self, ask: Ask, on_wait: Callable[[Waiting], None]) -> Answer:
        route = routing()
        if self.delay:
            on_wait(Waiting("loading", 0.5))
            await asyncio.sleep(self.delay)
        if ask.load_only:
            return Answer(route, singly(_nothing()))
        call = ask.calls[Engine.LLAMA]
        url = self.urls.get(ask.model) or self.urls[f"{ask.model}:latest"]
        session = aiohttp.ClientSession(headers=EngineAddress(url, self.key).headers)
        try:
            body = msgspec.json.encode(call.body)
            if ask.media is not None:
                body = await ask.media.put_back(body)
            answer = await session.post(url + call.path, data=sendable(body))
            if answer.status != 200:
                raise engine_refusal(answer.status, await answer.read())
        except BaseException:
            await session.close()
            raise
        return Answer(route, singly(_events(answer, ask.stream)), session.close)


async def _nothing() -> AsyncIterator[bytes]:
    return
    yield b""


async def _events(answer: aiohttp.ClientResponse, stream: bool) -> AsyncIterator[bytes]:
    if not stream:
        yield await answer.read()
        return
    async for line in answer.content:
        if line.startswith(b"data: "):
            payload = line[6:].rstrip(b"\n")
            if payload != b"[DONE]":
                yield payload
