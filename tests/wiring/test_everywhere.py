"""Three real daemons with different models each: all are listed once on all, and each answers everywhere."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from sollold.agent.llama_find import Llama
from sollold.models import demo
from tests.models.stores import OllamaStore
from tests.ollama_standin import Known, Standin

pytestmark = [pytest.mark.cluster, pytest.mark.llama]

MODELS = {
    "alpha:latest": "Alpha says hello.",
    "user/beta:7b": "Beta says hello.",
    "gamma:latest": "Gamma recites.",
}


class Town:
    """Daemons on loopback, by their HTTP ports."""

    def __init__(self, folder: Path, llama: Llama) -> None:
        self.folder = folder
        self.llama = llama
        self.ports = free_ports(6)
        self.children: list[asyncio.subprocess.Process] = []
        self.session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60))

    async def start(self, index: int, ollama: str) -> None:
        home = self.folder / str(index)
        seeds = [f"127.0.0.1:{self.ports[1]}"] if index else []
        settings = home / "sollold.toml"
        settings.write_text(
            f'[node]\nname = "{index}"\nstate_dir = "{home}/state"\ncache_dir = "{home}/cache"\n'
            f'[http]\nhost = "127.0.0.1"\nport = {self.ports[2 * index]}\n'
            f'[cluster]\nhost = "127.0.0.1"\nport = {self.ports[2 * index + 1]}\nmdns = false\n'
            f"seeds = {json.dumps(seeds)}\n"
            f'[ollama]\nurl = "{ollama}"\nenabled = {json.dumps(bool(ollama))}\n'
            f'[models]\nhuggingface = false\nollama_stores = ["{home}/store"]\nfolders = ["{home}/m"]\n'
            f'[llama]\nbuild = false\nserver = "{self.llama.server}"\n'
            f'rpc_server = "{self.llama.worker}"\n'
            "[placement]\ncontext = 512\nslots = 1\n"
        )
        command = [sys.executable, "-m", "sollold", "run", "--config", str(settings)]
        with (home / "log").open("wb") as log:
            environment = {**os.environ, "HOME": str(home)}
            child = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log, env=environment)
        self.children.append(child)

    async def close(self) -> None:
        await self.session.close()
        for child in self.children:
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(signal.SIGTERM)
        for child in self.children:
            try:
                await asyncio.wait_for(child.wait(), 20)
            except TimeoutError:
                child.kill()
                await child.wait()

    def url(self, index: int, path: str) -> str:
        return f"http://127.0.0.1:{self.ports[2 * index]}{path}"

    async def names(self, index: int) -> list[str]:
        try:
            async with self.session.get(self.url(index, "/api/tags")) as answer:
                return sorted(model["name"] for model in (await answer.json())["models"])
        except aiohttp.ClientError:
            return []

    async def ask(self, index: int, model: str) -> dict[str, Any]:
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "stream": False}
        async with self.session.post(self.url(index, "/api/chat"), json=body) as answer:
            return dict(await answer.json())


def free_ports(count: int) -> list[int]:
    taken = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(one.getsockname()[1]) for one in taken]
    for one in taken:
        one.close()
    return ports


@pytest.fixture
async def town(tmp_path: Path, llama: Llama) -> AsyncIterator[Town]:
    town = Town(tmp_path, llama)
    try:
        yield town
    finally:
        await town.close()


async def test_all_listed_once_and_each_answers_from_every_node(town: Town, tmp_path: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for index, name in enumerate(("alpha:latest", "user/beta:7b")):
            home = tmp_path / str(index)
            home.mkdir()
            OllamaStore(home / "store").model(name, home, seed=index)
            standin = await stack.enter_async_context(Standin([Known(name, text=MODELS[name])]))
            await town.start(index, standin.url)
        folder = tmp_path / "2" / "m"
        folder.mkdir(parents=True)
        demo.write(folder / "gamma.gguf", demo.Recital(demo.pieces(MODELS["gamma:latest"])))
        await town.start(2, "")
        for index in range(3):
            for _ in range(300):
                if (listed := await town.names(index)) == sorted(MODELS):
                    break
                await asyncio.sleep(0.2)
            assert listed == sorted(MODELS)
        for index in range(3):
            for name, text in MODELS.items():
                answer = await until_answered(town, index, name)
                assert answer["message"]["content"].strip() == text, (index, name, answer)


async def until_answered(town: Town, index: int, name: str) -> dict[str, Any]:
    """The answer, once the endpoints of the others are known there."""
    for _ in range(60):
        if "message" in (answer := await town.ask(index, name)):
            return answer
        await asyncio.sleep(0.5)
    raise AssertionError(answer)
