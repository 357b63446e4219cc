"""Message orders that chat templates refuse, in every dialect."""

from __future__ import annotations

import time
from typing import Any

import pytest
from aiohttp import ClientSession

from sollold.api.engine.conversation import flatten, merge_answers, results_in_order, tidy
from sollold.api.engine.tolerant import template_refusal
from sollold.errors import Fault, Refusal
from tests.api.api_parts import ScriptedService, call_of, chunk, model, parts, usage_chunk
from tests.api.conftest import Serve
from tests.api.dialects import PATHS, body_of, error_of, post, text_of


def turn(role: str, content: Any = "", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


CALL = {"id": "call00000", "type": "function", "function": {"name": "get", "arguments": "{}"}}
ODD_ORDERS = {
    "two user turns": [turn("user", "a"), turn("user", "b")],
    "assistant first": [turn("assistant", "hello"), turn("user", "a")],
    "late system": [turn("user", "a"), turn("assistant", "b"), turn("system", "c"), turn("user", "d")],
    "two systems": [turn("system", "a"), turn("system", "b"), turn("user", "c")],
    "two assistants": [turn("user", "a"), turn("assistant", "b"), turn("assistant", "c"), turn("user", "d")],
    "tools without support in the template": [
        turn("user", "a"),
        turn("assistant", "", tool_calls=[CALL]),
        turn("tool", "noon", tool_call_id="call00000"),
    ],
    "a result without its call": [turn("tool", "noon", tool_call_id="call00000")],
    "speakers with names": [turn("user", "a", name="x"), turn("user", "b", name="y")],
}


@pytest.mark.llama
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", ODD_ORDERS)
async def test_messages_are_reordered_for_a_strict_template(
    real: str, http: ClientSession, path: str, case: str
) -> None:
    status, answer, headers = await post(http, real + path, body_of(path, "strict", ODD_ORDERS[case]))
    assert status == 200, answer
    assert text_of(path, answer).startswith("Hello")
    if case == "two user turns" and path != "/v1/responses":
        assert "reordered" in headers["X-Sollold-Warning"]


@pytest.mark.parametrize("path", PATHS)
async def test_a_conversation_that_the_template_refuses_in_every_form_is_refused(
    serve: Serve, http: ClientSession, path: str
) -> None:
    service = ScriptedService()
    trace = (
        "Unable to generate parser for this template. Automatic parser generation failed: \n------------\n"
        "While executing CallExpression at line 4\n   ^\nError: Jinja Exception: only poems are taken"
    )
    service.refusal = Refusal(Fault.ENGINE, trace, status=500)
    url = await serve(parts(service))
    status, answer, _ = await post(http, url + path, body_of(path, "demo", ODD_ORDERS["late system"]))
    assert status == 400
    assert error_of(path, answer) == (
        "the model's chat template refuses this conversation: only poems are taken"
    )
    # Three attempts: as sent, tidied, flattened.
    assert len(service.asks) == 3
    service.refusal = Refusal(Fault.ENGINE, "boom", status=500)
    status, answer, _ = await post(http, url + path, body_of(path, "demo", ODD_ORDERS["late system"]))
    assert status == 502 and len(service.asks) == 4


async def test_messages_that_the_template_accepts_are_sent_unchanged(
    serve: Serve, http: ClientSession
) -> None:
    service = ScriptedService(chunk("a"), chunk(finish="stop"), usage_chunk())
    url = await serve(parts(service))
    body = body_of("/v1/chat/completions", "demo", ODD_ORDERS["late system"], stream=True)
    async with http.post(f"{url}/v1/chat/completions", json=body) as answer:
        assert answer.status == 200 and "X-Sollold-Warning" not in answer.headers
    assert call_of(service).body["messages"] == ODD_ORDERS["late system"]


def test_tidy_and_flatten() -> None:
    assert tidy(ODD_ORDERS["late system"]) == [
        turn("system", "c"),
        turn("user", "a"),
        turn("assistant", "b"),
        ODD_ORDERS["late system"][3],
    ]
    assert tidy(ODD_ORDERS["two user turns"]) == [turn("user", "a\n\nb")]
    assert tidy(ODD_ORDERS["assistant first"]) == [turn("user"), *ODD_ORDERS["assistant first"]]
    assert tidy(ODD_ORDERS["a result without its call"]) == [turn("user", "noon")]
    picture = {"type": "image_url", "image_url": {"url": "data:,"}}
    merged = tidy([turn("user", "a"), turn("user", [picture])])
    assert merged == [turn("user", [{"type": "text", "text": "a"}, picture])]
    # Messages of different names are not merged; calls stay before their results.
    named = [turn("user", "a", name="x"), turn("user", "b", name="y")]
    assert tidy(named) == named
    called = ODD_ORDERS["tools without support in the template"]
    assert tidy(called) == called
    assert [(m["role"], m["content"]) for m in flatten([turn("system", "s"), *called])] == [
        ("user", "s\n\na"),
        ("assistant", '{"name":"get","arguments":"{}"}'),
        ("user", "noon"),
    ]


@pytest.mark.parametrize("path", PATHS)
async def test_tool_results_are_sent_in_the_order_of_their_calls(
    serve: Serve, http: ClientSession, path: str
) -> None:
    """Claude Code sends results as calls finish, and templates write no ids, so they are reordered."""
    service = ScriptedService(chunk("ok"), chunk(finish="stop"), usage_chunk())
    url = await serve(parts(service, model(capabilities=("completion", "tools"))))
    calls = [{**CALL, "id": id_} for id_ in ("a", "b", "c")]
    results = [turn("tool", f"of {id_}", tool_call_id=id_) for id_ in ("c", "a", "b")]
    conversation = [
        turn("user", "go"),
        turn("assistant", "", tool_calls=calls),
        *results,
        turn("user", "and?"),
    ]
    async with http.post(url + path, json=body_of(path, "demo", conversation, stream=True)) as answer:
        assert answer.status == 200, await answer.text()
    sent = call_of(service).body["messages"]
    assert [message["content"] for message in sent if message["role"] == "tool"] == ["of a", "of b", "of c"]
    assert [message["role"] for message in sent] == [message["role"] for message in conversation]


def test_tidy_gives_calls_the_ids_that_mistrals_templates_require() -> None:
    """They refuse ids of another length, even those that llama-server makes."""
    ids = ["call_0", "toolu_01A", "call_0", "abcDEF123"]
    turns = [
        message
        for id_ in ids
        for message in (
            turn("user", "a"),
            turn("assistant", tool_calls=[{**CALL, "id": id_}]),
            turn("tool", "noon", tool_call_id=id_),
            turn("assistant", "b"),
        )
    ]
    tidied = tidy(turns)
    called = [call["id"] for message in tidied for call in message.get("tool_calls", ())]
    assert called == ["call00000", "call00001", "call00000", "abcDEF123"]
    assert [message["tool_call_id"] for message in tidied if message["role"] == "tool"] == called
    assert turns[1]["tool_calls"][0]["id"] == "call_0"


def test_results_with_ambiguous_ids_keep_their_order() -> None:
    def conversation(ids: str, results: str) -> list[Any]:
        calls = [{**CALL, "id": id_} for id_ in ids]
        return [turn("assistant", tool_calls=calls), *(turn("tool", tool_call_id=id_) for id_ in results)]

    for ids, results in (("aa", "aa"), ("ab", "xb"), ("ab", "b"), ("a", "a"), ("ab", "ab")):
        assert results_in_order(conversation(ids, results)) == conversation(ids, results)
    assert results_in_order(conversation("ab", "bax")) == conversation("ab", "abx")
    assert results_in_order(conversation("ab", "ba") + conversation("cd", "dc")) == conversation(
        "ab", "ab"
    ) + conversation("cd", "cd")


def test_ordering_many_results_is_fast() -> None:
    ids = [f"c{n}" for n in range(30_000)]
    calls = turn("assistant", tool_calls=[{"id": id_} for id_ in ids])
    results = [turn("tool", tool_call_id=id_) for id_ in ids]
    began = time.thread_time()
    assert results_in_order([calls, *reversed(results)]) == [calls, *results]
    assert time.thread_time() - began < 1


def test_consecutive_answers_are_merged() -> None:
    first, second = turn("assistant", "b", reasoning_content="x"), turn("assistant", "c", tool_calls=[CALL])
    assert merge_answers([turn("user", "a"), first, second]) == [
        turn("user", "a"),
        turn("assistant", "b\n\nc", reasoning_content="x", tool_calls=[CALL]),
    ]
    assert merge_answers([second, first]) == [second, first]
    # Fields that templates ignore don't prevent merging.
    answers = [turn("assistant", "a", id="1", annotations=[]), turn("assistant", "b", id="2", refusal=None)]
    assert [message["content"] for message in merge_answers(answers)] == ["a\n\nb"]
    texts = [turn("assistant", [{"type": "text", "text": "a"}]), turn("assistant", "b")]
    assert [message["content"] for message in merge_answers(texts)] == ["a\n\nb"]


def test_named_messages_are_merged_when_flattened() -> None:
    """AutoGen names every speaker, and sends several user messages in a row."""
    named = [turn("user", "a", name="x"), turn("user", "b", name="y"), turn("user", "c", name="y")]
    assert flatten(named) == [turn("user", "a\n\nb\n\nc")]
    assert flatten(named[1:]) == [turn("user", "b\n\nc", name="y")]


def test_template_refusals_are_recognized() -> None:
    assert template_refusal("the model is loading") is None
    assert template_refusal("JSON schema error at #: unrecognized type any") is None
    assert template_refusal("x\nError: Jinja Exception: No  way!\n") == "No way!"
    assert template_refusal("While executing X\nError: Unknown filter y") == "Unknown filter y"


@pytest.mark.llama
@pytest.mark.parametrize("path", PATHS)
async def test_messages_are_reordered_for_another_nodes_template(
    far: str, http: ClientSession, path: str
) -> None:
    for case in ("two user turns", "late system", "a result without its call"):
        status, answer, _ = await post(http, far + path, body_of(path, "strict", ODD_ORDERS[case]))
        assert status == 200, answer
        assert text_of(path, answer).startswith("Hello")
    # Refusals of a template don't count as faults of the endpoint.
    async with http.get(f"{far}/api/cluster") as response:
        assert not [
            deployment for deployment in (await response.json())["deployments"] if deployment["reason"]
        ]


@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_thousands_of_messages_are_merged_quickly(role: str) -> None:
    # A million characters joined one message at a time would be copied a thousand times.
    messages = [{**turn(role, "x" * 1900), "reasoning_content": "y"} for _ in range(4096)]
    started = time.thread_time()
    for form in (merge_answers, tidy, flatten):
        form(messages)
    assert time.thread_time() - started < 0.25
    contents = [message["content"] for message in tidy(messages)]
    assert contents[-1] == "\n\n".join(["x" * 1900] * 4096)
