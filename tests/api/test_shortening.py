"""Truncation of prompts longer than the context: what is removed and kept, with real llama-servers."""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp import ClientSession

from sollold.api.engine.conversation import oldest_exchanges, without
from sollold.api.engine.truncate import first_and_last, room_for_prompt
from sollold.api.http.services import AppServices
from sollold.errors import Fault, Refusal
from sollold.serving.request import Answer, Ask, Engine
from tests.api import reciters
from tests.api.api_parts import PlainLibrary, ScriptedService, call_of, parts
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


def test_exchanges_are_removed_but_system_messages_and_the_last_turn_stay() -> None:
    exchanges = oldest_exchanges(TALK)
    assert exchanges == [[0, 2, 3, 4]]
    assert without(TALK, []) == TALK
    assert without(TALK, exchanges) == [TALK[1], TALK[5]]
    assert oldest_exchanges([TALK[1], TALK[5]]) == []
    # A leading assistant message is a separate exchange; consecutive user messages belong to one.
    unusual = [
        turn("assistant", "hello"),
        turn("user", "a"),
        turn("user", "b"),
        turn("assistant", "c"),
        TALK[5],
    ]
    assert oldest_exchanges(unusual) == [[0], [1, 2, 3]]


def test_tool_steps_are_removed_with_their_results_except_the_last() -> None:
    call = turn("assistant", "", tool_calls=[{"id": "a"}])
    agent = [turn("user", "go"), call, turn("tool", "1"), turn("tool", "2"), call, turn("tool", "3")]
    assert oldest_exchanges(agent) == [[1, 2, 3]]
    assert without(agent, oldest_exchanges(agent)) == [agent[0], agent[4], agent[5]]


def test_first_and_last_tokens_of_a_prompt_are_kept() -> None:
    tokens = list(range(10))
    assert first_and_last(tokens, 0, 20) == tokens
    assert first_and_last(tokens, 0, 4) == [6, 7, 8, 9]
    assert first_and_last(tokens, 1, 4) == [0, 7, 8, 9]
    assert first_and_last(tokens, 9, 4) == first_and_last(tokens, -1, 4) == [0, 1, 2, 3]


def test_the_answer_reserves_up_to_a_quarter_of_the_context() -> None:
    assert room_for_prompt(1000, 10) == 990
    assert room_for_prompt(1000, 900) == room_for_prompt(1000, None) == room_for_prompt(1000, -1) == 750
    assert room_for_prompt(1, None) == 1


class RecordingService(DirectService):
    """Records the requests."""

    asks: list[Ask]

    async def open(self, ask: Ask, on_wait: Any) -> Answer:
        self.asks = [*getattr(self, "asks", []), ask]
        return await super().open(ask, on_wait)

    def last(self, path: str) -> dict[str, Any]:
        calls = [ask.calls[Engine.LLAMA] for ask in self.asks]
        return next(call.body for call in reversed(calls) if call.path == path)


@pytest.fixture
def service(engines: dict[str, str]) -> RecordingService:
    return RecordingService(engines)


def services_of(service: RecordingService) -> AppServices:
    return parts(service, library=PlainLibrary(*reciters.MODELS))


async def post(http: ClientSession, url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    async with http.post(url, json={"stream": False, **body}) as answer:
        return answer.status, await answer.json(content_type=None)


@pytest.mark.llama
async def test_a_long_conversation_loses_its_oldest_turns(
    serve: Serve, http: ClientSession, service: RecordingService
) -> None:
    url = await serve(services_of(service))
    conversation = [turn("system", "Be brief.")]
    conversation += [turn("user" if n % 2 else "assistant", f"{n} " + "word " * 60) for n in range(1, 20)]
    body = {"model": "demo", "messages": conversation, "options": {"num_predict": 5}}
    status, refused = await post(http, f"{url}/api/chat", {**body, "truncate": False})
    assert status == 400 and "exceeds the available context size" in refused["error"]
    for stream in (False, True):
        async with http.post(f"{url}/api/chat", json={**body, "stream": stream}) as answer:
            assert answer.status == 200 and "done_reason" in await answer.text()
        sent = service.last("/v1/chat/completions")["messages"]
        assert sent[0] == conversation[0] and sent[-1] == conversation[-1]
        assert 2 < len(sent) < len(conversation) and sent[1:] == conversation[-len(sent) + 1 :]
    status, whole = await post(http, f"{url}/api/chat", body)
    # One more turn would not fit.
    assert status == 200 and 1024 - 5 - 400 < whole["prompt_eval_count"] <= 1024 - 5


@pytest.mark.llama
async def test_a_too_long_last_turn_keeps_its_end(
    serve: Serve, http: ClientSession, service: RecordingService
) -> None:
    url = await serve(services_of(service))
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
async def test_a_raw_prompt_keeps_num_keep_tokens_and_its_end(
    serve: Serve, http: ClientSession, service: RecordingService
) -> None:
    url = await serve(services_of(service))
    body = {"model": "demo", "prompt": "start " + "word " * 900, "raw": True, "options": {"num_keep": 2}}
    status, whole = await post(http, f"{url}/api/generate", body)
    assert status == 200 and whole["prompt_eval_count"] == 768
    async with http.post(f"{url}/tokenize", json={"model": "demo", "content": body["prompt"]}) as answer:
        tokens = (await answer.json(content_type=None))["tokens"]
    sent = service.last("/v1/completions")["prompt"]
    begin = sent.index(tokens[0])
    assert sent[begin : begin + 2] == tokens[:2] and sent[begin + 2 :] == tokens[begin + 2 - 768 :]


@pytest.mark.llama
async def test_inputs_of_embeddings_are_truncated_in_both_dialects(
    serve: Serve, http: ClientSession, service: RecordingService
) -> None:
    url = await serve(services_of(service))
    long = "two " * 300
    texts = ["one", long, [5, 6, 7] * 100]
    for embedding_input in (texts, long, [5, 6] * 200):
        status, answer = await post(
            http, f"{url}/v1/embeddings", {"model": "embed", "input": embedding_input}
        )
        assert status == 200 and len(answer["data"]) == (3 if embedding_input is texts else 1)
    paths = [call.path for call in (ask.calls[Engine.LLAMA] for ask in service.asks)]
    # Short texts are not tokenized.
    assert paths.count("/tokenize") == 4
    status, refused = await post(
        http, f"{url}/api/embed", {"model": "embed", "input": long, "truncate": False}
    )
    assert status == 400
    assert refused["error"] == "the input length exceeds the context length: context size (128 tokens)"
    status, answer = await post(http, f"{url}/api/embed", {"model": "embed", "input": [long, "one"]})
    assert status == 200 and len(answer["embeddings"]) == 2


@pytest.mark.llama
async def test_only_the_part_of_a_huge_text_that_can_stay_is_tokenized(
    serve: Serve, http: ClientSession, service: RecordingService
) -> None:
    url = await serve(services_of(service))
    text = "word " * 200_000 + "the end"
    body = {"model": "demo", "messages": [turn("system", "Be brief."), turn("user", text)]}
    status, whole = await post(http, f"{url}/api/chat", body)
    assert status == 200 and 600 < whole["prompt_eval_count"] <= 768
    sent = service.last("/v1/chat/completions")["messages"]
    assert sent[0]["content"] == "Be brief." and text.endswith(sent[1]["content"])
    raw = {"model": "demo", "prompt": "start " + text, "raw": True, "options": {"num_keep": 2}}
    status, whole = await post(http, f"{url}/api/generate", raw)
    assert status == 200 and whole["prompt_eval_count"] == 768
    embed = {"model": "embed", "input": [text, "one"]}
    for path in ("/api/embed", "/v1/embeddings"):
        status, _ = await post(http, url + path, embed)
        assert status == 200
    calls = [ask.calls[Engine.LLAMA] for ask in service.asks]
    read = [len(call.body["content"]) for call in calls if call.path == "/tokenize"]
    assert len(read) > 3 and max(read) < 200_000


@pytest.mark.llama
async def test_many_texts_are_embedded_in_pieces(
    serve: Serve, http: ClientSession, service: RecordingService
) -> None:
    url = await serve(services_of(service))
    texts = [f"text {number}" for number in range(270)]
    status, answer = await post(http, f"{url}/api/embed", {"model": "embed", "input": texts})
    assert status == 200 and len(answer["embeddings"]) == 270 and answer["prompt_eval_count"] > 500
    status, alone = await post(http, f"{url}/api/embed", {"model": "embed", "input": texts[-1]})
    assert answer["embeddings"][-1] == pytest.approx(alone["embeddings"][0], abs=1e-3)
    for path in ("/api/embed", "/v1/embeddings"):
        status, refused = await post(http, url + path, {"model": "embed", "input": ["x"] * 4097})
        assert status == 400 and "more than 4096 texts" in str(refused)


@pytest.mark.llama
async def test_a_truncated_conversation_alternates_for_a_strict_template(
    serve: Serve, http: ClientSession, service: RecordingService
) -> None:
    url = await serve(services_of(service))
    conversation = [turn("assistant", "hello"), turn("user", "a")]
    conversation += [turn("assistant" if n % 2 else "user", f"{n} " + "word " * 60) for n in range(1, 20)]
    conversation += [turn("system", "Be brief."), turn("user", "and?")]
    status, whole = await post(http, f"{url}/api/chat", {"model": "strict", "messages": conversation})
    assert status == 200 and 400 < whole["prompt_eval_count"] <= 768
    sent = service.last("/v1/chat/completions")["messages"]
    roles = [message["role"] for message in sent]
    assert roles[0] == "system" and roles[1:] == ["user", "assistant"] * (len(roles) // 2 - 1) + ["user"]
    assert "Be brief." in sent[0]["content"] and sent[-1]["content"].endswith("and?")


async def test_a_candidate_whose_tokens_can_not_be_counted_is_skipped(
    serve: Serve, http: ClientSession
) -> None:
    """The prompt without the two oldest exchanges can't be counted, without three it fits."""

    class Counting(ScriptedService):
        sizes = (900, 700, None, 300, 100)

        async def open(self, ask: Any, on_wait: Any) -> Answer:
            call = ask.calls[Engine.LLAMA]
            left = sum(message["role"] == "user" for message in call.body["messages"])
            self.refusal = None
            if call.path.endswith("input_tokens"):
                size = self.sizes[5 - left]
                self.events = ({"input_tokens": size},)
                if size is None:
                    self.refusal = Refusal(Fault.ENGINE, "no template for that", status=500)
            elif left > 2:
                message = "request (900 tokens) exceeds the available context size (400 tokens)"
                self.refusal = Refusal(Fault.ENGINE, message, status=400)
            else:
                self.events = ({"choices": [{"index": 0, "message": {"content": "a"}}]},)
            return await super().open(ask, on_wait)

    counting = Counting()
    url = await serve(parts(counting))
    conversation = [turn("assistant" if n % 2 else "user", str(n)) for n in range(9)]
    status, whole = await post(http, f"{url}/api/chat", {"model": "demo", "messages": conversation})
    assert status == 200 and whole["message"]["content"] == "a"
    assert [message["content"] for message in call_of(counting).body["messages"]] == ["6", "7", "8"]
