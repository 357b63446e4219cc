"""Three real daemons with different models: each node lists and serves every model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from sollold.engines.install.find import Llama
from sollold.models.gguf import demo_model
from tests.doubles import free_ports
from tests.models.stores import OllamaStore
from tests.ollama_standin import Known, Standin

pytestmark = [pytest.mark.cluster]

MODELS = {
    "alpha:latest": "Alpha says hello.",
    "user/beta:7b": "Beta says hello.",
    "gamma:latest": "Gamma recites.",
}


class Daemons:
    """Daemons on loopback, by their HTTP ports."""

    def __init__(self, folder: Path, llama: Llama | None) -> None:
        self.folder = folder
        self.llama = llama
        self.ports = free_ports(6)
        self.children: list[asyncio.subprocess.Process] = []
        self.session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60))

    async def start(self, index: int, ollama: str, *, models: str = "") -> None:
        """Start daemon ``index``. ``models``: further lines of the section ``[models]``."""
        home = self.folder / str(index)
        home.mkdir(exist_ok=True)
        seeds = [f"127.0.0.1:{self.ports[1]}"] if index else []
        binaries = ""
        if self.llama is not None:
            binaries = f'server = "{self.llama.server}"\nrpc_server = "{self.llama.worker}"\n'
        settings = home / "sollold.toml"
        settings.write_text(
            f'[node]\nname = "{index}"\nstate_dir = "{home}/state"\ncache_dir = "{home}/cache"\n'
            f'[http]\nhost = "127.0.0.1"\nport = {self.ports[2 * index]}\n'
            f'[cluster]\nhost = "127.0.0.1"\nport = {self.ports[2 * index + 1]}\nmdns = false\n'
            'door = "open"\n'
            f"seeds = {json.dumps(seeds)}\n"
            f'[ollama]\nurl = "{ollama}"\nenabled = {json.dumps(bool(ollama))}\n'
            f'[models]\nhuggingface = false\nollama_stores = ["{home}/store"]\nfolders = ["{home}/m"]\n'
            f"{models}[llama]\nbuild = false\n{binaries}"
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
        return await self.post(index, "/api/chat", body)

    async def post(self, index: int, path: str, body: dict[str, Any]) -> dict[str, Any]:
        async with self.session.post(self.url(index, path), json=body) as answer:
            return dict(await answer.json())

    async def lines(self, index: int, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the records of a streamed answer in either dialect."""
        async with self.session.post(self.url(index, path), json=body | {"stream": True}) as answer:
            raw = [line.removeprefix("data: ") for line in (await answer.text()).splitlines()]
        return [json.loads(line) for line in raw if line.startswith("{")]


@pytest.fixture
async def daemons(tmp_path: Path, llama: Llama) -> AsyncIterator[Daemons]:
    daemons = Daemons(tmp_path, llama)
    try:
        yield daemons
    finally:
        await daemons.close()


@pytest.fixture
async def pool(tmp_path: Path) -> AsyncIterator[Daemons]:
    """Daemons without llama.cpp, so that only Ollamas answer."""
    daemons = Daemons(tmp_path, None)
    try:
        yield daemons
    finally:
        await daemons.close()


@pytest.mark.llama
async def test_each_model_is_listed_once_and_answers_on_every_node(daemons: Daemons, tmp_path: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for index, name in enumerate(("alpha:latest", "user/beta:7b")):
            home = tmp_path / str(index)
            home.mkdir()
            OllamaStore(home / "store").model(name, home, seed=index)
            standin = await stack.enter_async_context(Standin([Known(name, text=MODELS[name])]))
            await daemons.start(index, standin.url)
        folder = tmp_path / "2" / "m"
        folder.mkdir(parents=True)
        demo_model.write(folder / "gamma.gguf", demo_model.Recital(demo_model.pieces(MODELS["gamma:latest"])))
        await daemons.start(2, "")
        for index in range(3):
            await until_listed(daemons, index, sorted(MODELS))
        for index in range(3):
            for name, text in MODELS.items():
                answer = await until_answered(daemons, index, name)
                assert answer["message"]["content"].strip() == text, (index, name, answer)


async def until_listed(daemons: Daemons, index: int, names: list[str]) -> None:
    for _ in range(300):
        if (listed := await daemons.names(index)) == names:
            return
        await asyncio.sleep(0.2)
    assert listed == names


async def until_running(daemons: Daemons, index: int, names: list[str]) -> None:
    """Wait until the Ollama's node has published its running models."""
    for _ in range(100):
        async with daemons.session.get(daemons.url(index, "/api/ps")) as answer:
            running = [model["name"] for model in (await answer.json())["models"]]
        if running == names:
            return
        await asyncio.sleep(0.2)
    assert running == names


async def until_answered(daemons: Daemons, index: int, name: str) -> dict[str, Any]:
    """Return the answer once node ``index`` knows the endpoints of the others."""
    for _ in range(60):
        if "message" in (answer := await daemons.ask(index, name)):
            return answer
        await asyncio.sleep(0.5)
    raise AssertionError(answer)


async def test_an_alias_is_translated_for_ollama_and_kept_in_the_answer(
    pool: Daemons,
) -> None:
    text = "Tiny says hello."
    messages = [{"role": "user", "content": "hi"}]
    async with Standin([Known("hf.co/org/Tiny:7b", text=text)]) as standin:
        for index, ollama in enumerate((standin.url, "")):
            await pool.start(index, ollama, models='aliases = { gpt-4o = "hf.co/org/tiny:7b" }\n')
        for index in range(2):
            await until_listed(pool, index, ["hf.co/org/Tiny:7b"])
            for written in ("gpt-4o", "tiny", "Tiny:7b", "HF.co/ORG/Tiny", "hf.co/org/Tiny:7b"):
                answer = await until_answered(pool, index, written)
                assert answer["message"]["content"] == text
                assert answer["model"] == written
            records = await pool.lines(index, "/api/generate", {"model": "gpt-4o", "prompt": "hi"})
            assert "".join(record.get("response", "") for record in records) == text, records
            assert {record.get("model") for record in records} == {"gpt-4o"}, records
            body = {"model": "gpt-4o", "messages": messages}
            chunks = await pool.lines(index, "/v1/chat/completions", body)
            words = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
            assert "".join(words) == text
            assert {chunk["model"] for chunk in chunks} == {"gpt-4o"}
            embedded = await pool.post(index, "/api/embed", {"model": "gpt-4o", "input": "hi"})
            assert embedded["model"] == "gpt-4o"
            assert len(embedded["embeddings"]) == 1
            loaded = await pool.post(index, "/api/generate", {"model": "tiny", "stream": False})
            assert loaded["done_reason"] == "load"
            assert list(standin.loaded) == ["hf.co/org/Tiny:7b"]
            await until_running(pool, index, ["hf.co/org/Tiny:7b"])
            unload = {"model": "gpt-4o", "keep_alive": 0, "stream": False}
            assert (await pool.post(index, "/api/generate", unload))["done_reason"] == "unload"
            assert not standin.loaded
            await until_running(pool, index, [])
