"""Check the API against ``/openapi.json`` with schemathesis: no status 500, and no undocumented answer."""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import ClientSession

from sollold.control.keys import Keys
from sollold.control.logs import LogService
from sollold.control.member_pass import MemberPasses
from sollold.control.models import Running
from sollold.errors import Fault, Refusal
from sollold.models.listing import Listed
from sollold.models.names import Resolved
from sollold.serving.request import Answer, Ask, Engine, Waiting
from tests.api.api_parts import (
    PlainLibrary,
    PlainRelayed,
    ScriptedPuller,
    chunk,
    endpoint,
    model,
    parts,
    routing,
    singly,
    usage_chunk,
)
from tests.api.conftest import Serve
from tests.doubles import FakeView, record
from tests.models.fakes import FakeCalls

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


class ShapedService:
    """Answers every path in llama-server's format."""

    async def open(self, ask: Ask, on_wait: Callable[[Waiting], None]) -> Answer:
        if ask.load_only:
            return Answer(routing(), singly(self._play()))
        call = ask.calls[Engine.LLAMA]
        if ask.stream:
            return Answer(routing(), singly(self._play(chunk("hi"), chunk(finish="stop"), usage_chunk())))
        choice: dict[str, Any] = {"message": {"role": "assistant", "content": "hi"}, "text": "hi"}
        whole: dict[str, Any] = {"choices": [{**choice, "finish_reason": "stop"}]}
        if call.path == "/v1/embeddings":
            inputs = call.body["input"]
            count = len(inputs) if isinstance(inputs, list) else 1
            whole = {"data": [{"index": place, "embedding": [1.0, 0.0]} for place in range(count)]}
        elif call.path.endswith("input_tokens"):
            whole = {"input_tokens": 3}
        elif call.path == "/infill":
            whole = {"content": "hi", "stop": True, "stop_type": "eos"}
        return Answer(routing(), singly(self._play(whole)))

    async def _play(self, *events: Any) -> AsyncIterator[bytes]:
        for event in events:
            yield msgspec.json.encode(event)


class AnyModelLibrary(PlainLibrary):
    """Finds a model for every name, so that requests get past the lookup."""

    async def find(self, name: str) -> Listed:
        return self.all["demo:latest"]


class AcceptingRelay:
    """An Ollama that accepts every request."""

    async def forward(
        self, method: str, path: str, body: AsyncIterator[bytes] | bytes, model: str = ""
    ) -> PlainRelayed:
        if not isinstance(body, bytes):
            async for _ in body:
                pass
        return PlainRelayed() if method == "HEAD" else PlainRelayed(b'{"status":"success"}')


class RefusingService:
    """Refuses with each fault in turn, before or in the middle of an answer."""

    def __init__(self) -> None:
        faults = [fault for fault in Fault if fault not in (Fault.ENGINE, Fault.BAD_REQUEST)]
        refusals = [Refusal(fault, "no") for fault in faults]
        statuses = (*range(400, 430), 500, 501, 503)
        refusals += [Refusal(Fault.ENGINE, "no", status=status) for status in statuses]
        self._refusals = itertools.cycle(refusals)
        self._in_the_middle = itertools.cycle((False, True, True))

    async def open(self, ask: Ask, on_wait: Callable[[Waiting], None]) -> Answer:
        refusal = next(self._refusals)
        if ask.stream and next(self._in_the_middle):
            return Answer(routing(), singly(self._break(refusal)))
        raise refusal

    async def _break(self, refusal: Refusal) -> AsyncIterator[bytes]:
        yield msgspec.json.encode(chunk("hi"))
        raise refusal


def any_model_library() -> AnyModelLibrary:
    all_capabilities = ("completion", "tools", "thinking", "vision", "insert", "embedding")
    library = AnyModelLibrary(model("demo:latest", capabilities=all_capabilities))
    library.loaded = (Running(endpoint(), "alpha"),)
    return library


async def examine(url: str, folder: Path, checks: str, *arguments: str) -> None:
    """Run schemathesis against the server. Fails if it finds anything."""
    pytest.importorskip("schemathesis")
    process = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).with_name("schemathesis")),
        "run",
        f"{url}/openapi.json",
        *("--checks", checks, "--seed", "7", "--no-color"),
        *arguments,
        cwd=folder,
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


@pytest.mark.timeout(280)
async def test_schemathesis_finds_no_undocumented_answer(serve: Serve, tmp_path: Path) -> None:
    steps = ScriptedPuller({"status": "success"})
    view, calls = FakeView(record("0" * 16)), FakeCalls("0" * 16, {})
    services = parts(
        ShapedService(),
        library=any_model_library(),
        puller=steps,
        relay=AcceptingRelay(),
        keys=Keys(view, calls, tmp_path / "keys.json"),
        passes=MemberPasses(view, calls, str),
        logs=LogService(view, calls, Resolved, tmp_path),
    )
    # Streams of events would never end.
    await services.monitor.close()
    url = await serve(services)
    await examine(url, tmp_path, CHECKS, "--phases", "examples,coverage,fuzzing", "--max-examples", "6")


@pytest.mark.timeout(280)
async def test_every_refusal_is_described(serve: Serve, tmp_path: Path) -> None:
    services = parts(RefusingService(), library=any_model_library())
    await services.monitor.close()
    url = await serve(services)
    checks = CHECKS.removeprefix("not_a_server_error,")
    await examine(url, tmp_path, checks, "--phases", "fuzzing", "--max-examples", "8")


async def test_parameters_and_responses_are_described(serve: Serve, http: ClientSession) -> None:
    url = await serve(parts(ShapedService()))
    async with http.get(f"{url}/openapi.json") as answer:
        paths = (await answer.json())["paths"]
    page = paths["/api/batch/results/{id}"]["get"]
    assert {parameter["name"] for parameter in page["parameters"]} == {"id", "offset", "limit"}
    models = {
        parameter["name"]: parameter["schema"]["type"]
        for parameter in paths["/v1/models"]["get"]["parameters"]
    }
    assert models == {"limit": "integer", "after_id": "string", "before_id": "string"}
    for path in ("/api/chat", "/v1/chat/completions", "/v1/messages", "/v1/responses", "/api/batch/embed"):
        post = paths[path]["post"]
        assert {"X-Sollold-Priority", "X-Sollold-Deadline"} <= {
            parameter["name"] for parameter in post["parameters"]
        }
        assert {"200", "400", "405", "408", "413", "429", "500", "503"} <= set(post["responses"])
        assert "X-Sollold-Node" in post["responses"]["200"]["headers"]
        assert "Retry-After" in post["responses"]["503"]["headers"]
