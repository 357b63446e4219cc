"""Real llama-servers are killed in the middle of answers; the resulting text must be exact."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from sollold.cluster.gossip.record import Backend, Endpoint, State
from sollold.engines.install.find import Llama
from sollold.errors import Fault, Refusal
from sollold.models.gguf import demo_model
from sollold.serving.request import Answer
from tests.doubles import until
from tests.serving.cluster_double import MODEL, Cluster, Node, ask, text_of

pytestmark = pytest.mark.llama

COUNTING = tuple(f"w{n:04}{'é🙂' if n % 7 == 3 else ''} " for n in range(1, 2001))
THINKING = (
    "<think>\n",
    *(f"r{n:04} " for n in range(1, 1001)),
    "\n</think>\n\n",
    *(f"w{n:04} " for n in range(1, 1001)),
)
NUMBERS = ('{"n": [', *(f"{n}, " for n in range(1000, 2000)), "1]}")
TEMPLATE = Path(__file__).parent.parent / "api" / "qwen_like.jinja"
SCHEMA = {"type": "object", "properties": {"n": {"type": "array", "items": {"type": "integer"}}}}
GRAMMAR = r'root ::= "{\"n\": [" ([0-9]+ ", ")+ "1]}"'


class Engine:
    """One llama-server."""

    def __init__(self, llama: Llama, model: Path, words: tuple[str, ...]) -> None:
        self._llama = llama
        self._model = model
        self._words = words
        self._process: asyncio.subprocess.Process | None = None
        self.url = ""

    async def start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        fixed = ["--host", "127.0.0.1", "-np", "2", "-c", "16384", "-t", "1", "--jinja"]
        fixed += ["--cache-ram", "0", "-fit", "off"]
        self._process = await asyncio.create_subprocess_exec(
            str(self._llama.server),
            *("-m", str(self._model), "--port", str(port)),
            *fixed,
            *self._words,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        async with aiohttp.ClientSession() as session:
            for _ in range(600):
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.get(self.url + "/health") as health:
                        if health.status == 200:
                            return
                await asyncio.sleep(0.05)
        raise AssertionError("llama-server did not start")

    def signal(self, how: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            # asyncio learns of the exit shortly after the process has been reaped.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, how)

    async def stop(self) -> None:
        self.signal(signal.SIGKILL)
        if self._process is not None:
            await self._process.wait()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reciters")
    paths = {}
    for name, pieces in (("counting", COUNTING), ("thinking", THINKING), ("numbers", NUMBERS)):
        paths[name] = folder / f"{name}.gguf"
        # Wide layers make tokens slow enough for a kill in the middle of the answer.
        demo_model.write(paths[name], demo_model.Recital(pieces, name=name, width=512, layers=2))
    return paths


class Pair:
    """Node a receives requests; b and c have a llama-server each. The one on c is used after b's dies."""

    def __init__(self, asked: Node, engines: list[Engine], owner: Node) -> None:
        self.asked = asked
        self.engines = engines
        self.owner = owner

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        self.engines[0].signal(how)
        self.owner.engines.drop("d1")


@contextlib.asynccontextmanager
async def pair(cluster: Cluster, llama: Llama, model: Path, *words: str) -> AsyncIterator[Pair]:
    a, b, c = [await cluster.node(name) for name in "abc"]
    engines = [Engine(llama, model, words), Engine(llama, model, words)]
    try:
        await asyncio.gather(*(engine.start() for engine in engines))
        for node, id, engine, active in ((b, "d1", engines[0], 0), (c, "d2", engines[1], 9)):
            node.engines.urls[id] = engine.url
            endpoint = Endpoint(
                id, MODEL, "", Backend.LOCAL, State.READY, context=8192, slots=2, active=active
            )
            node.view.update_me(endpoints=(endpoint,))
        yield Pair(a, engines, b)
    finally:
        for engine in engines:
            await engine.stop()


async def cut(
    pair: Pair, count: int, how: signal.Signals, form: str, **more: Any
) -> tuple[list[Any], Answer]:
    """Request an answer, kill its engine after ``count`` events, and return all events."""
    answer = await pair.asked.serving.open(ask(form, **more), lambda _: None)
    events = []
    async for event in answer.events:
        events.append(json.loads(event))
        if len(events) == count:
            pair.kill(how)
    return events, answer


def reasoning_of(events: list[Any]) -> str:
    deltas = [c.get("delta") or {} for e in events for c in e.get("choices", ())]
    return "".join(delta.get("reasoning_content") or "" for delta in deltas)


@pytest.mark.parametrize("form", ["chat", "text", "native"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
async def test_a_stream_continues_after_its_engine_is_killed(
    cluster: Cluster, llama: Llama, models: dict[str, Path], form: str, how: signal.Signals
) -> None:
    async with pair(cluster, llama, models["counting"]) as both:
        events, answer = await cut(both, 60, how, form, max_tokens=900, temperature=0)
        assert text_of(events) == "".join(COUNTING[:900])
        assert answer.routing.resumed == 1
        assert answer.routing.node == "host-c"
        if form == "native":
            assert events[-1]["tokens_predicted"] == 900
            assert events[-1]["stop_type"] == "limit"
        else:
            usage = events[-1]["usage"]
            assert usage["completion_tokens"] == 900
            assert usage["prompt_tokens"] < 30
            assert usage["total_tokens"] == usage["prompt_tokens"] + 900
            assert len({event["id"] for event in events}) == 1


async def test_an_interrupted_answer_reaches_its_end_token(
    cluster: Cluster, llama: Llama, models: dict[str, Path]
) -> None:
    async with pair(cluster, llama, models["counting"]) as both:
        events, _ = await cut(both, 1200, signal.SIGKILL, "chat")
        assert text_of(events) == "".join(COUNTING)
        assert events[-2]["choices"][0]["finish_reason"] == "stop"
        # The last token is the one that ends the answer.
        assert events[-1]["usage"]["completion_tokens"] == len(COUNTING) + 1


@pytest.mark.parametrize("count", [100, 1100])
async def test_reasoning_and_content_continue(
    cluster: Cluster, llama: Llama, models: dict[str, Path], count: int
) -> None:
    async with pair(cluster, llama, models["thinking"], "--chat-template-file", str(TEMPLATE)) as both:
        events, answer = await cut(both, count, signal.SIGKILL, "chat", max_tokens=1500)
        assert answer.routing.resumed == 1
        assert reasoning_of(events).rstrip() == "".join(THINKING[1:1001]).rstrip()
        assert text_of(events) == "".join(THINKING[1002:1500])
        assert events[-1]["usage"]["completion_tokens"] == 1500


@pytest.mark.parametrize("instructed", [False, True])
async def test_a_prefilled_answer_continues(
    cluster: Cluster, llama: Llama, models: dict[str, Path], instructed: bool
) -> None:
    begun = [{"role": "user", "content": "go on"}, {"role": "assistant", "content": "w0001 w0002 "}]
    words = {"continue_final_message": "content", "add_generation_prompt": False} if instructed else {}
    async with pair(cluster, llama, models["counting"]) as both:
        events, answer = await cut(both, 60, signal.SIGKILL, "chat", messages=begun, max_tokens=700, **words)
        assert answer.routing.resumed == 1
        # llama-server repeats the prefilled text unless it is told to continue it.
        assert text_of(events) == "".join(COUNTING[2 if instructed else 0 : 702])
        assert events[-1]["usage"]["completion_tokens"] == 700


@pytest.mark.parametrize(
    ("form", "more"),
    [
        ("chat", {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}),
        ("text", {"json_schema": SCHEMA}),
        ("text", {"grammar": GRAMMAR}),
        ("native", {"grammar": GRAMMAR}),
    ],
)
async def test_schemas_and_grammars_continue(
    cluster: Cluster, llama: Llama, models: dict[str, Path], form: str, more: dict[str, Any]
) -> None:
    async with pair(cluster, llama, models["numbers"]) as both:
        events, answer = await cut(both, 80, signal.SIGKILL, form, **more)
        assert answer.routing.resumed == 1
        assert text_of(events) == "".join(NUMBERS)
        assert len(json.loads(text_of(events))["n"]) == 1001


async def test_a_chat_with_the_callers_grammar_is_not_continued(
    cluster: Cluster, llama: Llama, models: dict[str, Path]
) -> None:
    async with pair(cluster, llama, models["numbers"]) as both:
        with pytest.raises(Refusal) as refusal:
            await cut(both, 80, signal.SIGKILL, "chat", grammar=GRAMMAR)
        assert refusal.value.fault is Fault.INTERRUPTED


@pytest.mark.parametrize("form", ["chat", "text"])
async def test_cut_after_the_last_token_of_the_limit(
    cluster: Cluster, llama: Llama, models: dict[str, Path], form: str
) -> None:
    async with pair(cluster, llama, models["counting"]) as both:
        # Close to the limit, the engine may or may not send the end before it dies.
        events, _ = await cut(both, 40, signal.SIGKILL, form, max_tokens=40)
        assert text_of(events) == "".join(COUNTING[:40])
        finishes = [c["finish_reason"] for e in events for c in e["choices"] if c.get("finish_reason")]
        assert finishes == ["length"]
        assert events[-1]["usage"]["completion_tokens"] == 40


async def test_a_non_streamed_request_is_repeated_after_a_kill(
    cluster: Cluster, llama: Llama, models: dict[str, Path]
) -> None:
    async with pair(cluster, llama, models["counting"]) as both:
        asking = asyncio.create_task(
            both.asked.serving.open(ask("chat", stream=False, max_tokens=1500), lambda _: None)
        )
        await until(lambda: both.owner.server.under_way == 1)
        await asyncio.sleep(0.1)
        both.kill()
        answer = await asking
        events = [json.loads(event) async for event in answer.events]
        assert text_of(events) == "".join(COUNTING[:1500])
