"""``/openapi.json`` is checked by schemathesis: no 500, and no answer that is not described."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sollold.api.parts import Listed, Running
from sollold.serving.ask import Answer, Ask, Engine, Waiting
from tests.api.api_parts import (
    PlainLibrary,
    PlainRelayed,
    ScriptedPuller,
    chunk,
    endpoint,
    model,
    parts,
    routing,
    usage_chunk,
)
from tests.api.conftest import Serve

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


class ShapedService:
    """Answers every path in its engine's form."""

    async def open(self, ask: Ask, on_wait: Callable[[Waiting], None]) -> Answer:
        if ask.load_only:
            return Answer(routing(), self._play())
        call = ask.calls[Engine.LLAMA]
        if ask.stream:
            return Answer(routing(), self._play(chunk("hi"), chunk(finish="stop"), usage_chunk()))
        said: dict[str, Any] = {"message": {"role": "assistant", "content": "hi"}, "text": "hi"}
        whole: dict[str, Any] = {"choices": [{**said, "finish_reason": "stop"}]}
        if call.path == "/v1/embeddings":
            inputs = call.body["input"]
            count = len(inputs) if isinstance(inputs, list) else 1
            whole = {"data": [{"index": place, "embedding": [1.0, 0.0]} for place in range(count)]}
        elif call.path.endswith("input_tokens"):
            whole = {"input_tokens": 3}
        elif call.path == "/infill":
            whole = {"content": "hi", "stop": True, "stop_type": "eos"}
        return Answer(routing(), self._play(whole))

    async def _play(self, *events: Any) -> AsyncIterator[bytes]:
        for event in events:
            yield msgspec.json.encode(event)


class Everything(PlainLibrary):
    """Has every model that is asked for: so that what comes after is reached."""

    async def find(self, name: str) -> Listed:
        return self.all["demo:latest"]


class PoliteRelay:
    """An Ollama that says yes to everything."""

    async def forward(
        self, method: str, path: str, body: AsyncIterator[bytes] | bytes, model: str = ""
    ) -> PlainRelayed:
        if not isinstance(body, bytes):
            async for _ in body:
                pass
        return PlainRelayed() if method == "HEAD" else PlainRelayed(b'{"status":"success"}')


@pytest.mark.timeout(280)
async def test_schemathesis_finds_nothing(serve: Serve, tmp_path: Path) -> None:
    pytest.importorskip("schemathesis")
    able = ("completion", "tools", "thinking", "vision", "insert", "embedding")
    library = Everything(model("demo:latest", capabilities=able))
    library.loaded = (Running(endpoint(), "alpha"),)
    steps = ScriptedPuller({"status": "success"})
    url = await serve(parts(ShapedService(), library=library, puller=steps, relay=PoliteRelay()))
    process = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).with_name("schemathesis")),
        "run",
        f"{url}/openapi.json",
        *("--checks", CHECKS, "--phases", "examples,coverage,fuzzing", "--max-examples", "6", "--seed", "7"),
        "--no-color",
        cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        out, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, out.decode(errors="replace")[-6000:]
