"""Pure functions of the API: conversion of requests and answers, stop sequences, templates, contexts."""

from __future__ import annotations

import base64
import dataclasses
import time
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sollold.api.anthropic.events import MessageEvents
from sollold.api.anthropic.messages_ask import Messages
from sollold.api.anthropic.request import messages_body
from sollold.api.anthropic.request_warnings import message_warnings
from sollold.api.engine.calls import ollama_body
from sollold.api.engine.embeddings import normalized, shortened
from sollold.api.engine.fields import parse_keep_alive
from sollold.api.engine.messages import image_part
from sollold.api.engine.stop_sequences import StopSequences
from sollold.api.http.body import as_type
from sollold.api.http.caller import parse_priority, prefix_of, priority_of
from sollold.api.http.cors import allowed
from sollold.api.http.errors import Dialect, error_object, refusal_object, status_of
from sollold.api.ollama.chat import ChatLines, chat_body
from sollold.api.ollama.generate import GenerateLines, generate_call, pack_context, turns_of, unpack_context
from sollold.api.ollama.generate import PackedTurn as Packed
from sollold.api.ollama.models import parameter_text
from sollold.api.ollama.request import (
    Chat,
    Generate,
    parse_options,
    response_format,
    sampling,
    thinking,
)
from sollold.api.ollama.template import render_template
from sollold.api.openai.request import ChatCompletion, chat_completion_body, checked_chat
from sollold.api.openai.responses_ask import ResponseAsk
from sollold.api.openai.responses_events import ResponseEvents
from sollold.api.openai.responses_request import response_body, response_warnings
from sollold.api.openai.responses_tools import OwnTool
from sollold.errors import Fault, Refusal
from sollold.models.model import Model
from sollold.priority import NAMES, ROLES
from sollold.serving.request import Engine, longest_input
from sollold.settings.schema import HttpSettings
from tests.api.api_parts import chunk, model, routing, usage_chunk

PICTURE = base64.b64encode(b"\x89PNG and more").decode()
CAPABLE_MODEL = model(capabilities=("completion", "tools", "thinking", "vision", "insert"))


def refused(call: Any) -> str:
    with pytest.raises(Refusal) as caught:
        call()
    assert caught.value.fault is Fault.BAD_REQUEST
    return caught.value.message


def chat(**fields: Any) -> dict[str, Any]:
    request = msgspec.convert(
        {"model": "demo", "messages": [{"role": "user", "content": "hi"}], **fields}, Chat
    )
    return chat_body(request, parse_options(request.options, CAPABLE_MODEL), CAPABLE_MODEL)


# --- options


def test_options_are_converted_for_llama_server() -> None:
    inputs = {
        "num_predict": 5,
        "temperature": 0,
        "top_k": 40.0,
        "repeat_last_n": -1,
        "num_keep": -1,
        "seed": 7,
        "stop": ["a", ""],
        "mirostat": 1,
        "num_gpu": 99,
        "typical_p": None,
    }
    assert sampling(parse_options(inputs, None)) == {
        "temperature": 0.0,
        "top_k": 40,
        "n_predict": 5,
        "repeat_last_n": 2**31 - 1,
        "n_keep": -1,
        "seed": 7,
        "stop": ["a"],
        "mirostat": 1,
    }
    assert sampling(parse_options({"num_predict": -2, "seed": -1, "stop": "x"}, None)) == {
        "n_predict": -1,
        "stop": ["x"],
    }


def test_options_of_a_request_override_the_models() -> None:
    configured = model(params='{"temperature": 0.1, "stop": ["<a>"]}')
    assert sampling(parse_options({"temperature": 0.9}, configured)) == {"temperature": 0.9, "stop": ["<a>"]}
    assert sampling(parse_options(None, model(params="nonsense"))) == {}
    assert "temperature" in refused(lambda: parse_options({"temperature": "hot"}, None))


@given(
    st.none()
    | st.floats()
    | st.integers()
    | st.text(max_size=20)
    | st.sampled_from([10**400, {}, {"a": 1}, [], [5]])
)
def test_keep_alive_is_a_number_or_a_refusal(value: Any) -> None:
    try:
        seconds = parse_keep_alive(value)
    except Refusal:
        return
    assert seconds is None or seconds == -1 or 0 <= seconds < 1e10


def test_format() -> None:
    assert response_format(None) is None and response_format("") is None
    assert response_format("json") == {"type": "json_object"}
    schema = {"type": "object"}
    for inputs in (schema, '{"type": "object"}'):
        assert response_format(inputs) == {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": schema},
        }
    assert "JSON schema" in refused(lambda: response_format("yaml"))
    refused(lambda: response_format(3))


def test_think() -> None:
    assert thinking(None, model()) == {}
    assert thinking(False, model()) == {"reasoning_effort": "none"}
    assert thinking("high", CAPABLE_MODEL)["reasoning_effort"] == "high"
    assert (
        thinking("true", CAPABLE_MODEL)
        == thinking(True, CAPABLE_MODEL)
        == {"chat_template_kwargs": {"enable_thinking": True}}
    )
    assert "does not support thinking" in refused(lambda: thinking("low", model()))
    assert "low, medium, high" in refused(lambda: thinking("deeply", CAPABLE_MODEL))


# --- chat


def test_images_become_parts() -> None:
    message = {"role": "user", "content": "what?", "images": [PICTURE]}
    (sent,) = chat(messages=[message])["messages"]
    assert sent["content"][0] == {"type": "text", "text": "what?"}
    assert sent["content"][1]["image_url"]["url"] == f"data:image/png;base64,{PICTURE}"
    assert "base64" in refused(lambda: image_part("not base64!"))
    request = msgspec.convert({"model": "demo", "messages": [message]}, Chat)
    assert "images" in refused(lambda: chat_body(request, parse_options(None, None), model()))


def test_tool_results_are_matched_with_their_calls() -> None:
    call = {"function": {"name": "get", "arguments": {"a": 1}}}
    other = {"function": {"name": "put", "arguments": {}}}
    sent = chat(
        messages=[
            {"role": "assistant", "content": "", "tool_calls": [call, other]},
            {"role": "tool", "content": "second", "tool_name": "put"},
            {"role": "tool", "content": "first"},
        ],
        tools=[{"type": "function", "function": {"name": "get"}}],
    )["messages"]
    assert sent[0]["tool_calls"][0]["function"]["arguments"] == '{"a":1}'
    assert [(m["tool_call_id"], m["name"], m["content"]) for m in sent[1:]] == [
        ("call_0", "get", "first"),
        ("call_1", "put", "second"),
    ]


def test_the_models_system_text_is_used_unless_the_request_has_one() -> None:
    configured = model(system="Be kind")
    request = msgspec.convert({"model": "demo", "messages": [{"role": "user", "content": "hi"}]}, Chat)
    assert chat_body(request, parse_options(None, None), configured)["messages"][0] == {
        "role": "system",
        "content": "Be kind",
    }
    request.messages = [msgspec.convert({"role": "system", "content": "Be brief"}, type(request.messages[0]))]  # type: ignore[index]
    assert [m["content"] for m in chat_body(request, parse_options(None, None), configured)["messages"]] == [
        "Be brief"
    ]


def test_tool_calls_are_sent_when_complete() -> None:
    lines = ChatLines("demo")

    def piece(index: int, arguments: str, name: str | None = None) -> bytes:
        call: dict[str, Any] = {"index": index, "function": {"arguments": arguments}}
        if name:
            call |= {"id": f"c{index}"}
            call["function"]["name"] = name
        return msgspec.json.encode(chunk(tool_calls=[call]))

    assert lines.feed(piece(0, '{"a', "get")) == []
    assert lines.feed(piece(0, '": 1}')) == []
    (first,) = lines.feed(piece(1, '{"b": ', "put"))
    assert first["message"]["tool_calls"] == [
        {"id": "c0", "function": {"index": 0, "name": "get", "arguments": {"a": 1}}}
    ]
    # The arguments of the second call were truncated.
    assert lines.feed(msgspec.json.encode(chunk(finish="length"))) == []
    assert lines.last_record(routing(), 1.0)["done_reason"] == "length"


def test_an_error_event_ends_the_answer() -> None:
    with pytest.raises(Refusal, match="boom"):
        ChatLines("demo").feed(b'{"error":{"code":500,"message":"boom"}}')
    with pytest.raises(Refusal, match="unreadable"):
        ChatLines("demo").feed(b"{")


# --- generate


def generate(**fields: Any) -> Any:
    request = msgspec.convert({"model": "demo", "prompt": "hi", **fields}, Generate)
    return generate_call(request, parse_options(request.options, CAPABLE_MODEL), CAPABLE_MODEL)


def test_generate_chooses_the_path_of_the_engine() -> None:
    assert generate(system="s").body["messages"] == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "hi"},
    ]
    assert generate(raw=True).path == "/v1/completions" and generate(raw=True).body["prompt"] == "hi"
    shaped = generate(
        template="{{ if .System }}S{{ .System }}{{ end }}[{{ .Prompt }}]{{ .Response }}x", system="s"
    )
    assert shaped.body["prompt"] == "Ss[hi]"
    fill = generate(suffix="end", format="json")
    assert fill.path == "/infill" and fill.body["input_suffix"] == "end" and fill.body["json_schema"]
    assert generate(context=[5, 6]).body["prompt"] == [5, 6, "hi"]
    assert "template" in refused(lambda: generate(template='{{ template "x" }}'))


@pytest.mark.parametrize("more", [{"template": "{{ .Prompt }}"}, {"system": "s"}, {"context": [5]}])
def test_raw_prompts_refuse_template_system_and_context(more: dict[str, Any]) -> None:
    message = refused(lambda: generate(raw=True, **more))
    assert message == "raw mode does not support template, system, or context"


def test_context_works_with_a_template_of_the_request() -> None:
    request = msgspec.convert(
        {"model": "demo", "prompt": "hi", "system": "s", "template": "[{{ .Prompt }}]"}, Generate
    )
    call = generate_call(request, parse_options(None, CAPABLE_MODEL), CAPABLE_MODEL)
    lines = GenerateLines("demo", call.path, turns_of(request, call, CAPABLE_MODEL))
    lines.feed(msgspec.json.encode({"choices": [{"index": 0, "text": "Hello", "finish_reason": None}]}))
    context = lines.last_record(routing(), 1.0)["context"]
    again = generate(prompt="more", template="<{{ .Prompt }}>{{ .Response }}", context=context)
    assert again.body["prompt"] == "<hi>Hello<more>"


@pytest.mark.parametrize(
    "way", [{"raw": True}, {"template": "{{ .Prompt }}"}, {"context": [5]}, {"suffix": "x"}]
)
def test_generate_refuses_thinking_and_too_many_logprobs_on_each_path(way: dict[str, Any]) -> None:
    plain = model(capabilities=("completion", "insert"))

    def request(**fields: Any) -> Any:
        generate = as_type({"model": "demo", "prompt": "hi", **way, **fields}, Generate)
        return generate_call(generate, parse_options(None, plain), plain)

    assert "does not support thinking" in refused(lambda: request(think=True))
    assert "unknown think" in refused(lambda: request(think="deep"))
    assert "top_logprobs" in refused(lambda: request(logprobs=True, top_logprobs=21))
    assert request(think=False).path == request().path


def test_templates_of_requests_have_thinking_and_suffix() -> None:
    template = "{{ if and .IsThinkSet .Think }}T{{ .ThinkLevel }}{{ end }}{{ .Prompt }}|{{ .Suffix }}"
    assert generate(template=template, think="high", suffix="s").body["prompt"] == "Thigh" + "hi|s"
    assert generate(template=template, think=True).body["prompt"] == "Thi|"
    assert generate(template=template, think=False).body["prompt"] == "hi|"
    assert generate(template=template).body["prompt"] == "hi|"


def test_fields_that_conflict_with_a_suffix_are_refused() -> None:
    for name, field in (
        ("images", {"images": [PICTURE]}),
        ("system", {"system": "s"}),
        ("context", {"context": [5]}),
    ):
        assert name in refused(lambda field=field: generate(suffix="x", **field))
    assert generate(suffix="x", logprobs=True, top_logprobs=3).body["n_probs"] == 3


def test_reasoning_is_renamed_for_ollama() -> None:
    message = {"role": "assistant", "content": "a", "reasoning_content": "so"}
    assert ollama_body({"messages": [message, 7], "model": "m", "priority": 1}) == {
        "messages": [{"role": "assistant", "content": "a", "reasoning": "so"}, 7],
        "model": "m",
    }
    assert message["reasoning_content"] == "so"
    assert ollama_body({"messages": [{**message, "reasoning": "that"}]})["messages"][0]["reasoning"] == "that"


def test_max_completion_tokens_is_renamed_for_ollama() -> None:
    assert ollama_body({"max_completion_tokens": 5}) == {"max_tokens": 5}
    assert ollama_body({"max_completion_tokens": 5, "max_tokens": 3}) == {"max_tokens": 3}


def test_context_has_the_conversation() -> None:
    request = msgspec.convert({"model": "demo", "prompt": "hi", "system": "s"}, Generate)
    call = generate_call(request, parse_options(None, CAPABLE_MODEL), CAPABLE_MODEL)
    lines = GenerateLines("demo", call.path, turns_of(request, call, CAPABLE_MODEL))
    lines.feed(msgspec.json.encode(chunk("Hel")))
    lines.feed(msgspec.json.encode(chunk("lo")))
    context = lines.last_record(routing(), 1.0)["context"]
    assert all(isinstance(number, int) for number in context)
    again = generate(prompt="more", context=context)
    assert [(m["role"], m["content"]) for m in again.body["messages"]] == [
        ("system", "s"),
        ("user", "hi"),
        ("assistant", "Hello"),
        ("user", "more"),
    ]
    assert "context" in refused(lambda: generate(context=[*context[:-3], 300]))
    assert "context" in refused(lambda: generate(context=context[:-2]))


@given(st.lists(st.builds(Packed, st.text(max_size=9), st.text(max_size=50)), max_size=5))
def test_context_is_packed_without_loss(turns: list[Packed]) -> None:
    assert unpack_context(pack_context(turns)) == turns


@given(st.lists(st.integers(-10, 300), max_size=30))
def test_any_context_is_read_or_refused(numbers: list[int]) -> None:
    try:
        unpack_context([-7301, *numbers])
    except Refusal as refusal:
        assert refusal.fault is Fault.BAD_REQUEST


# --- templates


def test_templates() -> None:
    values = {"System": "", "Prompt": "p"}
    assert render_template("a {{- if .System }} S {{ else }} N {{ end -}} b", values) == "a N b"
    assert (
        render_template("{{ if not .System }}x{{ end }}{{ if and .System .Prompt }}y{{ end }}", values) == "x"
    )
    assert render_template("{{/* hm */}}{{ if .System }}1{{ else if .Prompt }}2{{ end }}", values) == "2"
    for broken in ("{{ if .System }}", "{{ end }}", "{{ else }}", "{{ .Odd }}", "{{ range .Messages }}"):
        refused(lambda broken=broken: render_template(broken, values))


@pytest.mark.parametrize("part", ["{{", "{{ .Prompt ", "{{- "])
def test_an_unclosed_template_is_refused_in_bounded_time(part: str) -> None:
    before = time.process_time()
    assert "{{ without }}" in refused(lambda: render_template(part * (90_000 // len(part)), {}))
    # Searching for the end from each of them would take minutes and block the loop.
    assert time.process_time() - before < 5


@given(st.text("{}. -ifelsendSystemPrompt", max_size=60))
def test_any_template_is_rendered_or_refused(template: str) -> None:
    try:
        render_template(template, {"System": "s", "Prompt": "p"})
    except Refusal as refusal:
        assert refusal.fault is Fault.BAD_REQUEST


# --- stop sequences


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_sequences_are_found_in_any_chunks(
    text: str, stop_words: list[str], data: st.DataObject
) -> None:
    places = [place for word in stop_words if (place := text.find(word)) >= 0]
    stops = StopSequences(stop_words)
    shown, rest = "", text
    while rest:
        length = data.draw(st.integers(1, len(rest)))
        shown += stops.feed(rest[:length])
        rest = rest[length:]
        assert len(text) - len(rest) - len(shown) <= 4 or stops.found is not None
    shown += stops.flush()
    if not places:
        assert stops.found is None and shown == text
    else:
        assert stops.found in stop_words and stops.found is not None
        assert text.startswith(shown + stops.found)


# --- OpenAI, Anthropic, responses


def llama_body(body: dict[str, Any], served: Model) -> dict[str, Any]:
    request = msgspec.convert(body, ChatCompletion)
    return chat_completion_body(checked_chat(body, request, served), request, served)


def test_openai_bodies() -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in ("a", "b")]
    body = {
        "model": "demo",
        "messages": [
            {"role": "assistant", "reasoning": "hm", "tool_calls": []},
            {"role": "user", "content": "x"},
        ],
        "tools": tools,
        "tool_choice": {"type": "function", "function": {"name": "b"}},
    }
    sent = llama_body(body, CAPABLE_MODEL)
    assert sent["messages"][0] == {"role": "assistant", "reasoning_content": "hm", "content": ""}
    assert sent["tools"] == tools[1:] and sent["tool_choice"] == "required"
    body["tool_choice"] = {"type": "function", "function": {"name": "c"}}
    assert "not among" in refused(lambda: llama_body(body, CAPABLE_MODEL))
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": PICTURE}]}],
    }
    assert "images" in refused(lambda: llama_body(body, model()))


def test_anthropic_bodies() -> None:
    request = msgspec.convert(
        {
            "model": "demo",
            "max_tokens": 5,
            "system": [{"type": "text", "text": "s"}],
            "messages": [
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "hm", "signature": ""},
                        {"type": "text", "text": "I look"},
                        {"type": "tool_use", "id": "t1", "name": "get", "input": {"a": 1}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "tool_result",
                            "tool_use_id": "t1",
                            "content": [{"type": "text", "text": "noon"}],
                        },
                        {"type": "image", "source": {"type": "base64", "data": PICTURE}},
                        {"type": "text", "text": "so?"},
                    ],
                },
            ],
            "stop_sequences": ["x"],
            "thinking": {"type": "enabled", "budget_tokens": 100},
        },
        Messages,
    )
    body = messages_body(request, CAPABLE_MODEL)
    assert [message["role"] for message in body["messages"]] == ["system", "assistant", "tool", "user"]
    assert body["messages"][1]["reasoning_content"] == "hm"
    assert body["messages"][1]["tool_calls"][0]["function"] == {"name": "get", "arguments": '{"a":1}'}
    assert body["messages"][2] == {"role": "tool", "tool_call_id": "t1", "content": "noon"}
    assert body["reasoning_budget_tokens"] == 100 and "stop" not in body
    request.max_tokens = None
    assert "max_tokens" in refused(lambda: messages_body(request, CAPABLE_MODEL))


@pytest.mark.parametrize("kind", ["enabled", "adaptive", "disabled"])
def test_anthropic_thinking_is_left_out_for_a_model_without_it(kind: str) -> None:
    request = {
        "model": "demo",
        "max_tokens": 5,
        "messages": [{"role": "user", "content": "hi"}],
        "thinking": {"type": kind, "budget_tokens": 1024},
    }
    body = messages_body(msgspec.convert(request, Messages), model())
    assert not {"chat_template_kwargs", "reasoning_budget_tokens", "reasoning_effort"} & set(body)


@pytest.mark.parametrize("separate", [True, False])
def test_the_system_prompt_of_claude_code_is_the_same_in_each_request(separate: bool) -> None:
    """Its billing header differs in each; the whole prompt would have to be processed again."""

    def messages(cch: str) -> Any:
        header, rest = (
            f"x-anthropic-billing-header: cc_version=2.1.37.0d9; cch={cch};",
            "You are Claude Code.",
        )
        texts = [header, rest] if separate else [header + rest]
        system = [{"type": "text", "text": text} for text in texts]
        request = {
            "model": "demo",
            "max_tokens": 5,
            "system": system,
            "messages": [{"role": "user", "content": "hi"}],
        }
        return messages_body(msgspec.convert(request, Messages), model())["messages"]

    assert messages("fa690")[0] == {"role": "system", "content": "You are Claude Code."}
    assert messages("fa690") == messages("0aaa9")


def test_the_beginning_of_an_answer_is_refused_beside_a_format() -> None:
    """As at Anthropic: the format applies to what is generated, so both together are no JSON."""
    request: dict[str, Any] = {
        "model": "demo",
        "max_tokens": 5,
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "{"}],
        "output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}},
    }
    assert "output format" in refused(lambda: messages_body(msgspec.convert(request, Messages), model()))
    request["messages"].append({"role": "user", "content": "go on"})
    assert "response_format" in messages_body(msgspec.convert(request, Messages), model())


def test_order_of_anthropic_events() -> None:
    events = MessageEvents("demo")
    inputs = [
        chunk(None, role="assistant"),
        chunk(reasoning_content="hm"),
        chunk("Hi"),
        chunk(tool_calls=[{"index": 0, "id": "c", "function": {"name": "get", "arguments": "{"}}]),
        chunk(tool_calls=[{"index": 0, "function": {"arguments": "}"}}]),
        chunk(finish="tool_calls"),
        usage_chunk(),
    ]
    out = [
        event for source in inputs for event in events.feed(msgspec.json.encode(source))
    ] + events.last_events()
    kinds = [event["type"].removeprefix("content_block_") for event in out]
    thought, text = ["start", "delta", "delta", "stop"], ["start", "delta", "stop"]
    called = ["start", "delta", "delta", "stop"]
    assert kinds == ["message_start", *thought, *text, *called, "message_delta", "message_stop"]
    assert out[-2]["delta"]["stop_reason"] == "tool_use" and out[-2]["usage"]["output_tokens"] == 2
    assert [block["type"] for block in events.result()["content"]] == ["thinking", "text", "tool_use"]
    assert events.result()["content"][2]["input"] == {}


def test_text_that_may_begin_a_stop_sequence_comes_before_the_call_after_it() -> None:
    for further in (
        {"tool_calls": [{"index": 0, "id": "c", "function": {"name": "get", "arguments": "{}"}}]},
        {"reasoning_content": "hm"},
    ):
        events = MessageEvents("demo", ["\n\nHuman:"])
        for source in (chunk("I look.\n\n"), chunk(**further), chunk(finish="stop")):
            events.feed(msgspec.json.encode(source))
        events.last_events()
        content = events.result()["content"]
        assert content[0] == {"type": "text", "text": "I look.\n\n"} and len(content) == 2


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ("[1]", {"arguments": [1]}),
        ("null", {}),
        ("", {}),
        # Beyond the range of a double, which JSON allows.
        ('{"limit":1e400}', {"limit": msgspec.Raw(b"1e400")}),
    ],
)
def test_arguments_of_a_call_are_an_object(arguments: str, wanted: dict[str, Any]) -> None:
    called = chunk(tool_calls=[{"index": 0, "id": "c", "function": {"name": "get", "arguments": arguments}}])
    events, lines = MessageEvents("demo"), ChatLines("demo")
    search = ResponseEvents(ResponseAsk(model="demo"), {"get": OwnTool("tool_search", "get", "", {})})
    for source in (called, chunk(finish="tool_calls")):
        events.feed(msgspec.json.encode(source))
        search.feed(msgspec.json.encode(source))
        records = lines.feed(msgspec.json.encode(source))
    events.last_events()
    search.last_events()
    assert events.result()["content"][0]["input"] == wanted
    assert search.result()["output"][0]["arguments"] == wanted
    assert records[0]["message"]["tool_calls"][0]["function"]["arguments"] == wanted


@pytest.mark.parametrize("omit", [False, True])
def test_thinking_has_a_signature_since_some_clients_do_not_return_it_without_one(omit: bool) -> None:
    events = MessageEvents("demo", omit_thinking=omit)
    for source in (chunk(reasoning_content="hm"), chunk("Hi"), chunk(finish="stop")):
        events.feed(msgspec.json.encode(source))
    events.last_events()
    assert events.result()["content"][0]["signature"]
    message = {"role": "assistant", "content": events.result()["content"]}
    request = {"model": "demo", "max_tokens": 9, "messages": [message]}
    body = messages_body(msgspec.convert(request, Messages), CAPABLE_MODEL)
    assert body["messages"] == [{"role": "assistant", "content": "Hi", "reasoning_content": "hm"}]


def test_omitted_thinking_is_restored_from_its_signature() -> None:
    events = MessageEvents("demo", omit_thinking=True)
    inputs = [chunk(reasoning_content="h"), chunk(reasoning_content="m"), chunk("Hi"), chunk(finish="stop")]
    out = [
        event for source in inputs for event in events.feed(msgspec.json.encode(source))
    ] + events.last_events()
    start, signed, stop = (event for event in out if event.get("index") == 0)
    block = events.result()["content"][0]
    assert start["content_block"] == {"type": "thinking", "thinking": "", "signature": ""}
    assert signed["delta"] == {"type": "signature_delta", "signature": block["signature"]}
    assert stop["type"] == "content_block_stop" and block["thinking"] == "" and block["signature"]
    message = {"role": "assistant", "content": events.result()["content"]}
    request: dict[str, Any] = {"model": "demo", "max_tokens": 9, "messages": [message]}
    body = messages_body(msgspec.convert(request, Messages), CAPABLE_MODEL)
    assert body["messages"] == [{"role": "assistant", "content": "Hi", "reasoning_content": "hm"}]
    # A signature of another server is ignored.
    message["content"][0]["signature"] = "EqQB"
    body = messages_body(msgspec.convert(request, Messages), CAPABLE_MODEL)
    assert body["messages"] == [{"role": "assistant", "content": "Hi"}]
    unknown = {**request, "thinking": {"type": "adaptive", "display": "loud"}}
    assert messages_body(msgspec.convert(unknown, Messages), CAPABLE_MODEL)["messages"] == body["messages"]
    assert "display loud has no effect" in message_warnings(unknown)[0]


def test_the_first_anthropic_event_has_the_prompt_tokens() -> None:
    events = MessageEvents("demo")
    # llama-server sends the role in a separate chunk without timings.
    assert events.feed(msgspec.json.encode(chunk(None, role="assistant"))) == []
    event = {**chunk("Hi"), "timings": {"cache_n": 5, "prompt_n": 7, "predicted_n": 1}}
    first = events.feed(msgspec.json.encode(event))[0]
    assert first["type"] == "message_start"
    usage = first["message"]["usage"]
    assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (7, 5)


def test_the_first_anthropic_event_of_an_ollama_has_an_estimate_of_the_prompt_tokens() -> None:
    events = MessageEvents("demo", estimate=lambda: 9)
    events.start(routing(Engine.OLLAMA))
    (first, *_) = events.feed(msgspec.json.encode(chunk("Hi")))
    assert first["message"]["usage"]["input_tokens"] == 9
    counts = {"prompt_tokens": 7, "completion_tokens": 1, "total_tokens": 8}
    events.feed(msgspec.json.encode({"choices": [], "usage": counts}))
    assert events.last_events()[-2]["usage"]["input_tokens"] == 7


@pytest.mark.parametrize(
    ("limit", "reason"), [(2, "max_tokens"), (3, "model_context_window_exceeded"), (0, "max_tokens")]
)
def test_an_answer_that_fills_the_context_does_not_claim_to_have_reached_max_tokens(
    limit: int, reason: str
) -> None:
    events = MessageEvents("demo", limit=limit)
    for source in (chunk("Hi"), chunk(finish="length"), usage_chunk(completion=2)):
        events.feed(msgspec.json.encode(source))
    assert events.last_events()[-2]["delta"]["stop_reason"] == reason
    assert events.result()["stop_reason"] == reason


def test_tokens_of_thinking_are_counted() -> None:
    message, response = MessageEvents("demo"), ResponseEvents(ResponseAsk(model="demo"), {})
    thoughts = [chunk(reasoning_content="h"), chunk(reasoning_content="m")]
    for source in (*thoughts, chunk("Hi"), chunk(finish="stop"), usage_chunk(completion=4)):
        message.feed(msgspec.json.encode(source))
        response.feed(msgspec.json.encode(source))
    message.last_events()
    response.last_events()
    assert message.result()["usage"]["output_tokens_details"] == {"thinking_tokens": 2}
    assert response.result()["usage"]["output_tokens_details"] == {"reasoning_tokens": 2}


@pytest.mark.parametrize(("top_logprobs", "shown"), [(None, 0), (0, 0), (2, 2)])
def test_responses_have_logprobs_on_request(top_logprobs: int | None, shown: int) -> None:
    request = msgspec.convert({"model": "demo", "input": "hi", "top_logprobs": top_logprobs}, ResponseAsk)
    assert "logprobs" not in response_body(request, CAPABLE_MODEL)
    request.include = ["message.output_text.logprobs"]
    body = response_body(request, CAPABLE_MODEL)
    assert body["logprobs"] is True and body["top_logprobs"] == max(1, shown)
    events = ResponseEvents(request, {})
    tops = [{"token": name, "logprob": -1.5, "bytes": [72]} for name in ("Hi", "Ho", "Ha")]
    first = chunk("Hi")
    first["choices"][0]["logprobs"] = {"content": [{**tops[0], "top_logprobs": tops}]}
    out = [event for source in (first, chunk(" you")) for event in events.feed(msgspec.json.encode(source))]
    out += events.last_events()
    wanted = [{**tops[0], "top_logprobs": tops[:shown]}]
    deltas = [event["logprobs"] for event in out if event["type"].endswith("text.delta")]
    assert deltas == [wanted, []]
    assert [event["logprobs"] for event in out if event["type"].endswith("text.done")] == [wanted]
    assert events.result()["output"][0]["content"][0]["logprobs"] == wanted
    over = {"model": "demo", "input": "a", "top_logprobs": 21}
    assert "top_logprobs" in refused(lambda: as_type(over, ResponseAsk))


def test_most_keepalives_of_a_response_do_not_repeat_it() -> None:
    events = ResponseEvents(ResponseAsk(model="demo"), {})
    assert [event["type"] for event in events.keep_alive()] == ["response.created", "response.in_progress"]
    assert sum(len(events.keep_alive()) for _ in range(60)) == 10


def test_a_response_is_converted_in_both_directions() -> None:
    request = msgspec.convert(
        {
            "model": "demo",
            "instructions": "s",
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
                {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
                {"type": "function_call", "call_id": "c1", "name": "get", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c1", "output": "noon"},
            ],
            "tools": [{"type": "function", "name": "get", "parameters": {"type": "object"}}],
            "tool_choice": {"type": "function", "name": "get"},
        },
        ResponseAsk,
    )
    body = response_body(request, CAPABLE_MODEL)
    assert [message["role"] for message in body["messages"]] == ["system", "user", "assistant", "tool"]
    assert (
        body["messages"][2]["reasoning_content"] == "hm"
        and body["messages"][2]["tool_calls"][0]["id"] == "c1"
    )
    assert body["tool_choice"] == "required" and body["tools"][0]["function"]["name"] == "get"
    events = ResponseEvents(request, {})
    out = events.start(routing())
    for source in (
        chunk(reasoning_content="hm"),
        chunk("Hi"),
        chunk(" you"),
        chunk(finish="length"),
        usage_chunk(),
    ):
        out += events.feed(msgspec.json.encode(source))
    out += events.last_events()
    assert [event["sequence_number"] for event in out] == list(range(len(out)))
    assert out[-1]["type"] == "response.incomplete"
    whole = events.result()
    assert whole["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [item["type"] for item in whole["output"]] == ["reasoning", "message"]
    assert whole["output"][1]["content"][0]["text"] == "Hi you" and whole["usage"]["output_tokens"] == 2
    request.previous_response_id = "resp_1"
    assert "previous_response_id" in refused(lambda: response_body(request, CAPABLE_MODEL))


def responses(**fields: Any) -> dict[str, Any]:
    request = msgspec.convert({"model": "demo", "input": "hi", **fields}, ResponseAsk)
    return response_body(request, dataclasses.replace(CAPABLE_MODEL, system="own"))


def test_responses_have_one_leading_system_message() -> None:
    user = {"role": "user", "content": "hi"}
    late = {"role": "developer", "content": "late"}
    both = responses(instructions="a", input=[{"role": "developer", "content": "b"}, user, late])
    assert both["messages"] == [{"role": "system", "content": "a\n\nb"}, user, late]
    for fields, text in (
        ({"input": [{"role": "system", "content": "b"}, user]}, "b"),
        ({"instructions": "a", "input": [user]}, "a"),
        # The model's system text applies only without another one.
        ({"input": [user]}, "own"),
    ):
        assert responses(**fields)["messages"] == [{"role": "system", "content": text}, user]
    assert responses(input=[user, late])["messages"] == [user, late]


def test_an_answer_of_responses_becomes_one_message_before_its_results() -> None:
    """A model may think again between two parallel calls, and write a text after a call."""
    items: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
    for name in ("a", "b"):
        thought = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": f"think {name}"}]}
        items += [thought, {"type": "function_call", "call_id": name, "name": name, "arguments": "{}"}]
    items += [{"role": "assistant", "content": [{"type": "output_text", "text": "I wait."}]}]
    items += [{"type": "function_call_output", "call_id": name, "output": name} for name in ("a", "b")]
    _, _, answer, first, second = responses(input=items)["messages"]
    assert (answer["reasoning_content"], answer["content"]) == ("think a\n\nthink b", "I wait.")
    assert [call["id"] for call in answer["tool_calls"]] == ["a", "b"]
    assert (first["content"], second["content"]) == ("a", "b")


def test_the_thinking_of_a_response_is_a_content_part() -> None:
    events = ResponseEvents(msgspec.convert({"model": "demo", "input": "hi"}, ResponseAsk), {})
    out = [
        event
        for source in (chunk(reasoning_content="hm"), chunk(finish="stop"))
        for event in events.feed(msgspec.json.encode(source))
    ] + events.last_events()
    assert [event["type"].removeprefix("response.") for event in out] == [
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert out[1]["part"] == {"type": "reasoning_text", "text": ""}
    assert out[4]["part"] == events.result()["output"][0]["content"][0]


def test_parts_of_responses_without_effect_warn_with_the_reason() -> None:
    body: dict[str, Any] = {"model": "demo", "input": "hi", "top_logprobs": 3}
    body["tools"] = [{"type": kind} for kind in ("apply_patch", "web_search", "local_shell")]
    assert response_warnings(body, msgspec.convert(body, ResponseAsk)) == (
        "tools of type web_search run at OpenAI and are left out",
        "tools of type apply_patch, local_shell are known only to OpenAI's models and are left out",
        "top_logprobs has no effect: include does not name message.output_text.logprobs",
    )
    body |= {"tools": None, "include": ["message.output_text.logprobs"]}
    assert response_warnings(body, msgspec.convert(body, ResponseAsk)) == ()


def test_tools_of_responses_that_run_elsewhere_are_left_out() -> None:
    search = {"type": "web_search", "external_web_access": False}
    function = {"type": "function", "name": "get", "parameters": {"type": "object"}}
    body = responses(tools=[search, function], tool_choice="auto")
    assert [tool["function"]["name"] for tool in body["tools"]] == ["get"]
    assert "tools" not in responses(tools=[search])
    for choice in ("required", {"type": "web_search"}):
        assert "web_search" in refused(lambda choice=choice: responses(tools=[search], tool_choice=choice))
    assert "not among" in refused(
        lambda: responses(tools=[search, function], tool_choice={"type": "web_search"})
    )
    assert "name" in refused(lambda: responses(tools=[{"type": "function"}]))


# --- small functions


def test_priorities() -> None:
    assert priority_of(None, None, None) == 5
    assert priority_of("high", 2, "batch") == 7 and priority_of(None, 2, "batch") == 2
    assert priority_of(None, None, "Researcher") == 8 and priority_of(None, None, "juggler") == 5
    assert {parse_priority(name) for name in NAMES} == set(range(1, 11))
    assert set(ROLES.values()) <= set(range(1, 11))
    wrong: object
    for wrong in (0, 11, "0", "urgently", True, 2.5, [], "９"):
        refused(lambda wrong=wrong: parse_priority(wrong))


def test_origins() -> None:
    known = ("http://localhost", "https://chat.example:8443")
    assert allowed("http://localhost:3000", "10.0.0.1:11435", known)
    assert allowed("http://10.0.0.1:11435", "10.0.0.1:11435", known)
    assert allowed("https://chat.example:8443", "x", known) and not allowed(
        "https://chat.example", "x", known
    )
    assert not allowed("http://localhost.evil.example", "x", known)
    assert not allowed("null", "x", known) and allowed("null", "x", ("*",))
    assert not allowed("http://[", "x", known)


@pytest.mark.parametrize(
    "origin",
    [
        "https://localhost:8443",
        "app://obsidian.md",
        "tauri://localhost",
        "vscode-webview://0k2f3",
        "vscode-file://vscode-app",
        "file://",
    ],
)
def test_origins_of_desktop_apps_are_allowed_as_in_ollama(origin: str) -> None:
    assert allowed(origin, "x", HttpSettings().cors_origins)
    assert not allowed(origin, "x", ("http://localhost", "apps://*", "://*"))
    assert not allowed("null", "x", ("://*",)) and not allowed("http://app.example", "x", ("app://*",))


def test_embeddings() -> None:
    assert normalized([3.0, 4.0]) == [0.6, 0.8] and normalized([0.0, 0.0]) == [0.0, 0.0]
    assert shortened([3.0, 4.0, 9.0], 2) == [0.6, 0.8]
    text = "input (300 tokens) is too large to process. increase the physical batch size (batch size: 128)"
    assert longest_input(text) == 128
    text = "input (500 tokens) is larger than the max context size (256 tokens). skipping"
    assert longest_input(text) == 256
    text = "request (10027 tokens) exceeds the available context size (1024 tokens), try increasing it"
    assert longest_input(text) == 1024
    assert longest_input("no such thing") is None


def test_prefixes_depend_on_the_start_of_a_conversation() -> None:
    first = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    later = [*first, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert prefix_of(first) == prefix_of(later) != ""
    assert prefix_of(first) != prefix_of([{"role": "user", "content": "a"}])
    cached = {"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}
    assert prefix_of([{"role": "system", "content": [cached]}, first[1]]) == prefix_of(first)
    assert prefix_of(None) == prefix_of([]) == prefix_of(["x"]) == ""


def test_formats_and_statuses_of_errors() -> None:
    assert error_object(Dialect.OLLAMA, 404, "m") == {"error": "m"}
    assert error_object(Dialect.OPENAI, 404, "m")["error"]["type"] == "not_found_error"
    assert error_object(Dialect.ANTHROPIC, 503, "m")["error"]["type"] == "overloaded_error"
    assert all(status_of(Refusal(fault, "m")) >= 400 for fault in Fault)
    of_engine = {400: 400, 404: 404, 418: 400, 422: 400, 429: 429, 500: 502, 501: 501, 503: 503, 0: 502}
    assert {s: status_of(Refusal(Fault.ENGINE, "m", status=s)) for s in of_engine} == of_engine


def test_a_too_long_prompt_has_the_error_that_agents_recognize() -> None:
    message = "request (4301 tokens) exceeds the available context size (4096 tokens), try increasing it"
    refusal = Refusal(Fault.ENGINE, message, status=400)
    openai = refusal_object(Dialect.OPENAI, refusal)["error"]
    assert openai["code"] == "context_length_exceeded" and openai["message"] == message
    anthropic = refusal_object(Dialect.ANTHROPIC, refusal)["error"]
    wanted = "prompt is too long: 4301 tokens > 4096 maximum"
    assert anthropic == {"type": "invalid_request_error", "message": wanted}
    explained = Refusal(Fault.ENGINE, f"{message}; no machine has more. The setting is x", status=400)
    error = refusal_object(Dialect.ANTHROPIC, explained)["error"]
    assert error["message"] == f"{wanted}; no machine has more. The setting is x"
    assert refusal_object(Dialect.OLLAMA, refusal) == {"error": message}
    other = refusal_object(Dialect.OPENAI, Refusal(Fault.ENGINE, "no such thing", status=400))
    assert other["error"]["code"] is None


@pytest.mark.parametrize(
    ("image", "capabilities"),
    [
        ("data:image/png;base64,", ("vision",)),
        ("data:image/png;base64,?", ("vision",)),
        ("http://x/a.png", ()),
    ],
)
def test_the_error_of_an_image_tells_agents_to_leave_it_out(
    image: str, capabilities: tuple[str, ...]
) -> None:
    content = [{"type": "input_image", "image_url": image}]
    ask = msgspec.convert({"model": "m", "input": [{"role": "user", "content": content}]}, ResponseAsk)
    with pytest.raises(Refusal) as refused:
        response_body(ask, model(capabilities=("completion", *capabilities)))
    engines = Refusal(Fault.ENGINE, "Failed to load image or audio file", status=400)
    for refusal in (refused.value, engines):
        error = refusal_object(Dialect.OPENAI, refusal)["error"]
        assert error["code"] == "invalid_value" and error["param"].endswith(".image_url")
        error = refusal_object(Dialect.ANTHROPIC, refusal)["error"]
        assert error["message"] == f"Could not process image: {refusal.message}"


def test_parameter_counts_are_written_as_in_ollama() -> None:
    counts = (8_030_261_248, 494_030_000, 1_500, 7, 27_000_000_000, 137_000_000, 2 * 10**12)
    texts = [parameter_text(count) for count in counts]
    assert texts == ["8.0B", "494.03M", "2K", "7", "27B", "137M", "2000B"]
