"""Prompts longer than the context: what goes, what stays, and what the real llama-server makes of it."""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp import ClientSession

from sollold.api.parts import Parts
from sollold.api.shortening import ends, room_for_prompt, turns_to_drop, without_oldest
from sollold.serving.ask import Answer, Ask, Engine
from tests.api import reciters
from tests.api.api_parts import PlainLibrary, parts
from tests.api.conftest import Serve
from tests.api.direct_service import DirectService


def turn(role: str, content: str = "", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


TALK = [
    turn("user", "one"),
    turn("system", "rules"),
    turn("assistant", "", tool_calls=[{"id": "a"}]),
    turn("tool", "noon"),
    turn("assistant", "two"),
    turn("user", "three"),
]


def test_the_oldest_turns_go_and_the_systems_words_and_the_last_turn_stay() -> None:
    assert turns_to_drop(TALK) == 4
    assert without_oldest(TALK, 0) == TALK
    assert without_oldest(TALK, 1) == TALK[1:]
    assert without_oldest(TALK, 4) == without_oldest(TALK, 99) == [TALK[1], TALK[5]]
    assert without_oldest([TALK[1], TALK[5]], 1) == [TALK[1], TALK[5]]


def test_a_tools_result_goes_with_its_call() -> None:
    assert without_oldest(TALK, 2) == [TALK[1], *TALK[4:]]


def test_a_plain_prompt_keeps_its_end_and_the_first_tokens_that_are_to_stay() -> None:
    tokens = list(range(10))
    assert ends(tokens, 0, 20) == tokens
    assert ends(tokens, 0, 4) == [6, 7, 8, 9]
    assert ends(tokens, 1, 4) == [0, 7, 8, 9]
    assert ends(tokens, 9, 4) == ends(tokens, -1, 4) == [0, 1, 2, 3]


def test_the_answer_gets_what_it_asks_for_up_to_a_quarter() -> None:
    assert room_for_prompt(1000, 10) == 990
    assert room_for_prompt(1000, 900) == room_for_prompt(1000, None) == room_for_prompt(1000, -1) == 750
    assert room_for_prompt(1, None) == 1


class Watched(DirectService):
    """Keeps what was asked."""

    asks: list[Ask]

    async def open(self, ask: Ask, on_wait: Any) -> Answer:
        self.asks = [*getattr(self, "asks", []), ask]
        return await super().open(ask, on_wait)

    def last(self, path: str) -> dict[str, Any]:
        found = [ask.calls[Engine.LLAMA] for ask in self.asks]
        return next(call.body for call in reversed(found) if call.path == path)


@pytest.fixture
def service(engines: dict[str, str]) -> Watched:
    return Watched(engines)


def over(service: Watched) -> Parts:
    return parts(service, library=PlainLibrary(*reciters.MODELS))


async def post(http: ClientSession, url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    async with http.post(url, json={"stream": False, **body}) as answer:
        return answer.status, await answer.json(content_type=None)


@pytest.mark.llama
async def test_a_long_talk_goes_on_without_its_oldest_turns(
    serve: Serve, http: ClientSession, service: Watched
) -> None:
    url = await serve(over(service))
    talk = [turn("system", "Be brief.")]
    talk += [turn("user" if n % 2 else "assistant", f"{n} " + "word " * 60) for n in range(1, 20)]
    body = {"model": "demo", "messages": talk, "options": {"num_predict": 5}}
    status, refused = await post(http, f"{url}/api/chat", {**body, "truncate": False})
    assert status == 400 and "exceeds the available context size" in refused["error"]
    for stream in (False, True):
        async with http.post(f"{url}/api/chat", json={**body, "stream": stream}) as answer:
            assert answer.status == 200 and "done_reason" in await answer.text()
        sent = service.last("/v1/chat/completions")["messages"]
        assert sent[0] == talk[0] and sent[-1] == talk[-1]
        assert 2 < len(sent) < len(talk) and sent[1:] == talk[-len(sent) + 1 :]
    status, whole = await post(http, f"{url}/api/chat", body)
    # One turn more would have been too much.
    assert status == 200 and 1024 - 5 - 400 < whole["prompt_eval_count"] <= 1024 - 5


@pytest.mark.llama
async def test_a_last_turn_that_is_too_long_keeps_its_end(
    serve: Serve, http: ClientSession, service: Watched
) -> None:
    url = await serve(over(service))
    text = "äé🙂 " * 2000 + "the end"
    body = {"model": "demo", "messages": [turn("system", "Be brief."), turn("user", text)]}
    status, whole = await post(http, f"{url}/api/chat", body)
    assert status == 200 and 600 < whole["prompt_eval_count"] <= 768
    sent = service.last("/v1/chat/completions")["messages"]
    assert (
        sent[0]["content"] == "Be brief."
        and text.endswith(sent[1]["content"])
        and len(sent[1]["content"]) > 100
    )
    status, whole = await post(http, f"{url}/api/generate", {"model": "demo", "prompt": text})
    assert status == 200 and 600 < whole["prompt_eval_count"] <= 768
    status, refused = await post(
        http, f"{url}/api/generate", {"model": "demo", "prompt": text, "truncate": False}
    )
    assert status == 400 and "exceeds" in refused["error"]
    status, refused = await post(
        http, f"{url}/api/generate", {"model": "demo", "system": text, "prompt": "hi"}
    )
    assert status == 400 and "exceeds" in refused["error"]


@pytest.mark.llama
async def test_a_raw_prompt_keeps_its_end_and_num_keep_of_its_beginning(
    serve: Serve, http: ClientSession, service: Watched
) -> None:
    url = await serve(over(service))
    body = {"model": "demo", "prompt": "start " + "word " * 900, "raw": True, "options": {"num_keep": 2}}
    status, whole = await post(http, f"{url}/api/generate", body)
    assert status == 200 and whole["prompt_eval_count"] == 768
    async with http.post(f"{url}/tokenize", json={"model": "demo", "content": body["prompt"]}) as answer:
        tokens = (await answer.json(content_type=None))["tokens"]
    sent = service.last("/v1/completions")["prompt"]
    begin = sent.index(tokens[0])
    assert sent[begin : begin + 2] == tokens[:2] and sent[begin + 2 :] == tokens[begin + 2 - 768 :]


@pytest.mark.llama
async def test_texts_to_embed_are_cut_in_both_dialects(
    serve: Serve, http: ClientSession, service: Watched
) -> None:
    url = await serve(over(service))
    long = "two " * 300
    texts = ["one", long, [5, 6, 7] * 100]
    for given in (texts, long, [5, 6] * 200):
        status, answer = await post(http, f"{url}/v1/embeddings", {"model": "embed", "input": given})
        assert status == 200 and len(answer["data"]) == (3 if given is texts else 1)
    asked = [call.path for call in (ask.calls[Engine.LLAMA] for ask in service.asks)]
    # Short ones are not even counted.
    assert asked.count("/tokenize") == 4
    status, refused = await post(
        http, f"{url}/api/embed", {"model": "embed", "input": long, "truncate": False}
    )
    assert status == 400 and "too large to process" in refused["error"]
    status, answer = await post(http, f"{url}/api/embed", {"model": "embed", "input": [long, "one"]})
    assert status == 200 and len(answer["embeddings"]) == 2
