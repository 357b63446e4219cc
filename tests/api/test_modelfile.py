"""SYSTEM, MESSAGE and PARAMETER of a Modelfile apply in every dialect."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from sollold.api.anthropic.messages_ask import Messages
from sollold.api.anthropic.request import messages_body
from sollold.api.engine.modelfile import add_parameters, own_context
from sollold.api.ollama.chat import chat_body
from sollold.api.ollama.generate import PackedTurn, generate_call, pack_context
from sollold.api.ollama.request import Chat, Generate, parse_options
from sollold.api.openai.request import (
    ChatCompletion,
    Completion,
    chat_completion_body,
    checked_chat,
    completion_body,
)
from sollold.api.openai.responses_ask import ResponseAsk
from sollold.api.openai.responses_request import response_body
from tests.api.api_parts import model

PARAMS = {"temperature": 0.3, "stop": ["<end>"], "seed": 7, "num_predict": 50, "num_ctx": 4096, "top_k": 9}
CONFIGURED_MODEL = model(
    system="Be kind.",
    messages=(("user", "one"), ("assistant", "two")),
    params=msgspec.json.encode(PARAMS).decode(),
)
TURNS = [{"role": "user", "content": "hi"}]


def ollama_chat(**more: Any) -> dict[str, Any]:
    request = msgspec.convert({"model": "demo", "messages": TURNS, **more}, Chat)
    return chat_body(request, parse_options(request.options, CONFIGURED_MODEL), CONFIGURED_MODEL)


def ollama_generate(**more: Any) -> dict[str, Any]:
    request = msgspec.convert({"model": "demo", "prompt": "hi", **more}, Generate)
    return generate_call(request, parse_options(request.options, CONFIGURED_MODEL), CONFIGURED_MODEL).body


def openai_chat(**more: Any) -> dict[str, Any]:
    body = {"model": "demo", "messages": TURNS, **more}
    request = msgspec.convert(body, ChatCompletion)
    return chat_completion_body(checked_chat(body, request, CONFIGURED_MODEL), request, CONFIGURED_MODEL)


def openai_responses(**more: Any) -> dict[str, Any]:
    return response_body(
        msgspec.convert({"model": "demo", "input": "hi", **more}, ResponseAsk), CONFIGURED_MODEL
    )


def anthropic(**more: Any) -> dict[str, Any]:
    body = {"model": "demo", "messages": TURNS, "max_tokens": 9, **more}
    return messages_body(msgspec.convert(body, Messages), CONFIGURED_MODEL)


DIALECTS = [ollama_chat, ollama_generate, openai_chat, openai_responses, anthropic]


@pytest.mark.parametrize("ask", DIALECTS)
def test_system_and_messages_come_first(ask: Any) -> None:
    assert [(message["role"], message["content"]) for message in ask()["messages"]] == [
        ("system", "Be kind."),
        ("user", "one"),
        ("assistant", "two"),
        ("user", "hi"),
    ]


@pytest.mark.parametrize("ask", DIALECTS)
def test_parameters_are_defaults(ask: Any) -> None:
    body = ask()
    assert (body["temperature"], body["seed"], body["stop"], body["top_k"]) == (0.3, 7, ["<end>"], 9)


@pytest.mark.parametrize("ask", [openai_chat, openai_responses, anthropic])
def test_fields_of_a_request_override_parameters(ask: Any) -> None:
    assert ask(temperature=0.9)["temperature"] == 0.9


@pytest.mark.parametrize("stop", [5, True, {"a": 1}])
def test_a_stop_parameter_of_another_type_is_ignored(stop: object) -> None:
    odd = model(params=json.dumps({"stop": stop, "top_k": 9}))
    assert add_parameters({}, odd) == {"top_k": 9}


def test_num_predict_is_the_default_of_max_tokens() -> None:
    assert openai_chat()["max_tokens"] == 50
    assert "max_tokens" not in openai_chat(max_completion_tokens=5)
    assert anthropic()["max_tokens"] == 9


def test_a_plain_completion_has_the_parameters_and_no_messages() -> None:
    body = {"model": "demo", "prompt": "x"}
    sent = completion_body(body, msgspec.convert(body, Completion), CONFIGURED_MODEL)
    assert (sent["prompt"], sent["temperature"]) == ("x", 0.3)


def test_a_continued_context_does_not_repeat_system_and_messages() -> None:
    packed = generate_call(
        msgspec.convert({"model": "demo", "prompt": "hi"}, Generate),
        parse_options(None, CONFIGURED_MODEL),
        CONFIGURED_MODEL,
    )
    assert len(packed.body["messages"]) == 4

    context = pack_context(
        [PackedTurn(message["role"], message["content"]) for message in packed.body["messages"]]
    )
    again = ollama_generate(context=context, prompt="more")["messages"]
    assert [message["content"] for message in again] == ["Be kind.", "one", "two", "hi", "more"]


@pytest.mark.parametrize("params", ["{}", "[]", "broken", '{"num_ctx": "many"}', '{"num_ctx": -1}'])
def test_invalid_parameters_are_ignored(params: str) -> None:
    assert own_context(model(params=params)) == 0
    assert own_context(CONFIGURED_MODEL) == 4096
