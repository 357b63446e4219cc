"""The npm clients ``ollama`` and ``openai`` against the application over real llama.cpp."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest

from sollold.models.demo import GREETING
from tests.api.reciters import THOUGHT

pytestmark = [pytest.mark.llama, pytest.mark.clients, pytest.mark.timeout(240)]

SCRIPT = Path(__file__).with_name("talk.mjs")


async def run(*words: str, cwd: Path | None = None, limit: float) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *words, cwd=cwd, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        async with asyncio.timeout(limit):
            out, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0, out.decode(errors="replace")


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("no Node here")
    return tmp_path_factory.mktemp("npm")


async def test_npm_clients(real: str, packages: Path) -> None:
    quiet = ("--silent", "--no-audit", "--no-fund", "--ignore-scripts")
    try:
        code, said = await run("npm", "install", *quiet, "ollama", "openai", cwd=packages, limit=120)
    except TimeoutError:
        code, said = 1, "it took too long"
    if code:
        pytest.skip(f"npm could not fetch the clients: {said[-300:]}")
    code, said = await run("node", str(SCRIPT), str(packages), real, limit=60)
    assert code == 0, said
    out = json.loads(said.strip().splitlines()[-1])
    for name in (
        "chat",
        "chatStreamed",
        "generated",
        "openai",
        "openaiStreamed",
        "responses",
        "responsesStreamed",
    ):
        assert out[name] == GREETING, name
    assert out["chatDone"] is True and "demo:latest" in out["models"] and out["version"].count(".") == 2
    assert out["call"] == out["openaiCall"] == {"zone": "utc"}
    assert out["thinking"].strip() == THOUGHT
    assert out["embedded"] == 2 and out["openaiEmbedded"] > 8 and out["openaiTokens"] > 10
    assert "not found" in out["missing"] and out["openaiMissing"] == 404
