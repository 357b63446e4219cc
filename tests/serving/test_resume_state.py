"""A stream interrupted at any events and merged again equals the uninterrupted one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sollold.serving.request import Call, Engine
from sollold.serving.resume.base import Continuation, NotResumable
from sollold.serving.resume.select import continuation_for
from tests.serving.cluster_double import text_of

WORDS = tuple(f"t{n}{'🙂' if n % 3 == 0 else ''} " for n in range(40))
THOUGHT = 12
"""Number of words of a chat that are reasoning."""


def words_in(text: str) -> int:
    return text.count(" ")


def chat(body: dict[str, Any], run: int) -> list[dict[str, Any]]:
    """Return the events that llama-server would send."""
    last = body["messages"][-1]
    begun = 0
    prompt = 3
    if last["role"] == "assistant":
        content, thought = last["content"], last.get("reasoning_content", "")
        assert body["continue_final_message"] == ("content" if content else "reasoning_content")
        begun = words_in(thought) + words_in(content)
        assert thought + content == "".join(WORDS[:begun])
        prompt += begun
    limit = body.get("max_tokens", 10**6)
    made = list(enumerate(WORDS))[begun : begun + limit]
    names = {"id": f"chat-{run}", "created": run, "model": "m"}

    def chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **names}

    events = [chunk({"role": "assistant", "content": None})]
    events += [chunk({"reasoning_content" if n < THOUGHT else "content": word}) for n, word in made]
    events.append(chunk({}, "length" if len(made) == limit else "stop"))
    counts = {"prompt_tokens": prompt, "completion_tokens": len(made), "total_tokens": prompt + len(made)}
    events.append({"choices": [], **names, "usage": counts})
    return events


def text(body: dict[str, Any], run: int) -> list[dict[str, Any]]:
    begun = words_in(body["prompt"].removeprefix("Say:"))
    assert body["prompt"] == "Say:" + "".join(WORDS[:begun])
    limit = body.get("max_tokens", 10**6)
    made = WORDS[begun : begun + limit]
    names = {"id": f"text-{run}", "created": run, "model": "m"}
    events: list[dict[str, Any]] = [
        {"choices": [{"text": word, "index": 0, "finish_reason": None}], **names} for word in made
    ]
    finish = "length" if len(made) == limit else "stop"
    counts = {
        "prompt_tokens": 1 + begun,
        "completion_tokens": len(made),
        "total_tokens": 1 + begun + len(made),
    }
    events.append({"choices": [{"text": "", "index": 0, "finish_reason": finish}], **names, "usage": counts})
    return events


def native(body: dict[str, Any], run: int) -> list[dict[str, Any]]:
    """Four of five words are held back until the fifth, as for the beginning of a stop string."""
    prompt = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
    begun = len(prompt) - 1
    assert prompt == ["Say:", *range(begun)]
    limit = body.get("n_predict", 10**6)
    events: list[dict[str, Any]] = []
    held = ""
    for made, n in enumerate(range(begun, min(len(WORDS), begun + limit)), 1):
        held += WORDS[n]
        content, held = ("", held) if n % 5 == 4 and n + 1 < len(WORDS) else (held, "")
        events.append({"content": content, "tokens": [n], "stop": False, "tokens_predicted": made})
    end = {"content": held, "tokens": [], "stop": True, "tokens_predicted": len(events)}
    events.append({**end, "tokens_evaluated": 1 + begun, "prompt": "Say:"})
    return events


def ollama(body: dict[str, Any], run: int) -> list[dict[str, Any]]:
    generate = "prompt" in body
    if generate:
        begun = words_in(body["prompt"].removeprefix("Say:"))
    else:
        last = body["messages"][-1]
        begun = words_in(last["content"]) if last["role"] == "assistant" else 0
    limit = (body.get("options") or {}).get("num_predict", 10**6)
    made = WORDS[begun : begun + limit]

    def line(word: str) -> dict[str, Any]:
        record = {"response": word} if generate else {"message": {"role": "assistant", "content": word}}
        return {"model": "m", "created_at": "t", **record, "done": False}

    done = {"done": True, "done_reason": "length" if len(made) == limit else "stop"}
    counts = {"eval_count": len(made), "prompt_eval_count": 3 + begun, "eval_duration": 5}
    return [*(line(word) for word in made), {**line(""), **done, **counts}]


ENGINES: dict[
    str, tuple[Callable[[dict[str, Any], int], list[dict[str, Any]]], Engine, str, dict[str, Any]]
] = {
    "chat": (chat, Engine.LLAMA, "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    "text": (text, Engine.LLAMA, "/v1/completions", {"prompt": "Say:"}),
    "native": (native, Engine.LLAMA, "/completion", {"prompt": "Say:"}),
    "ollama": (ollama, Engine.OLLAMA, "/api/chat", {"messages": [{"role": "user", "content": "x"}]}),
    "raw": (ollama, Engine.OLLAMA, "/api/generate", {"prompt": "Say:", "raw": True}),
    "prompt": (ollama, Engine.OLLAMA, "/api/generate", {"prompt": "x", "system": "y"}),
}


def limited(form: str, limit: int | None) -> dict[str, Any]:
    if limit is None:
        return {}
    if form == "native":
        return {"n_predict": limit}
    return (
        {"options": {"num_predict": limit}} if form in ("ollama", "raw", "prompt") else {"max_tokens": limit}
    )


@settings(max_examples=400)
@given(
    st.sampled_from(sorted(ENGINES)),
    st.lists(st.integers(0, 45), min_size=1, max_size=4),
    st.one_of(st.none(), st.integers(1, 42)),
)
def test_a_stream_interrupted_anywhere_equals_the_uninterrupted_one(
    form: str, cuts: list[int], limit: int | None
) -> None:
    engine, kind, path, body = ENGINES[form]
    body = {**body, **limited(form, limit)}
    call = Call(path, body)
    first = next((run for run, cut in enumerate(cuts) if cut), len(cuts))
    whole = engine(body, first)
    continuation: Continuation = continuation_for(kind, call)
    got: list[dict[str, Any]] = []
    for run, cut in enumerate([*cuts, None]):
        for event in engine(call.body, run)[:cut]:
            raw = json.dumps(event).encode()
            if continuation.resumed:
                got += [json.loads(merged) for merged in continuation.merge(raw)]
            else:
                continuation.add_events([raw])
                got.append(event)
        if cut is None:
            break
        if continuation.delivered:
            continuation.check()
            # Only llama-server can count tokens.
            call = continuation.resume(words_in(continuation.text) if kind is Engine.LLAMA else None)
            if closing := continuation.closing():
                got += [json.loads(event) for event in closing]
                break
    assert text_of(got) == text_of(whole)
    if form == "chat":
        reasoning = [c["delta"].get("reasoning_content") or "" for e in got for c in e["choices"]]
        assert "".join(reasoning) == "".join(WORDS[: min(THOUGHT, limit or 99)])
    if form in ("chat", "text"):
        # Equal event by event: ids, one role, one end, counts.
        assert got == whole
    elif form == "native":
        assert got[-1]["tokens_predicted"] == whole[-1]["tokens_predicted"]
        assert got[-1]["tokens_evaluated"] == whole[-1]["tokens_evaluated"]
        assert [event["stop"] for event in got].count(True) == 1
    else:
        assert got[-1]["eval_count"] == whole[-1]["eval_count"]
        assert got[-1]["done_reason"] == whole[-1]["done_reason"]
        assert [event["done"] for event in got].count(True) == 1
        key = "message" if form == "ollama" else "response"
        assert all(key in event for event in got)


@pytest.mark.parametrize(
    ("form", "more", "events"),
    [
        ("chat", {"logprobs": True}, []),
        ("chat", {"n": 2}, []),
        ("chat", {}, [{"choices": [{"delta": {"tool_calls": [{"index": 0}]}}]}]),
        ("chat", {"grammar": "root ::= .*"}, [{"choices": [{"delta": {"content": "x"}}]}]),
        ("text", {"logprobs": 3}, []),
        ("text", {"best_of": 2}, []),
        ("text", {"prompt": ["a", "b"]}, []),
        ("native", {"n_probs": 2}, []),
        ("native", {"prompt": [{"prompt_string": "<__media__>", "multimodal_data": ["x"]}]}, []),
        ("ollama", {"format": "json"}, [{"message": {"content": "x"}}]),
        ("ollama", {}, [{"message": {"content": "", "tool_calls": [{}]}}]),
        ("prompt", {"context": [1, 2]}, [{"response": "x"}]),
        ("ollama", {}, [{"message": {"content": "", "thinking": "x"}}]),
        ("prompt", {}, [{"response": "", "thinking": "x"}]),
    ],
)
def test_streams_that_cant_be_continued_exactly_are_refused(
    form: str, more: dict[str, Any], events: list[Any]
) -> None:
    _, kind, path, body = ENGINES[form]
    continuation = continuation_for(kind, Call(path, {**body, **more}))
    for event in events:
        continuation.add_events([json.dumps(event).encode()])
    with pytest.raises(NotResumable):
        continuation.check()


@pytest.mark.parametrize("prompt", [[1, 2], [[1, 2]]])
def test_a_prompt_of_tokens_is_continued_by_tokens(prompt: list[Any]) -> None:
    continuation = continuation_for(Engine.LLAMA, Call("/completion", {"prompt": prompt}))
    event = {"content": "x", "tokens": [3], "stop": False, "tokens_predicted": 1}
    continuation.add_events([json.dumps(event).encode()])
    continuation.check()
    assert continuation.resume(None).body["prompt"] == [1, 2, 3]


def test_an_ollama_stream_is_resumable_only_after_its_thinking() -> None:
    body = {"messages": [{"role": "user", "content": "x"}]}
    continuation = continuation_for(Engine.OLLAMA, Call("/v1/chat/completions", body))
    continuation.add_events([b'{"choices":[{"delta":{"reasoning":"x"}}]}'])
    with pytest.raises(NotResumable, match="thinking"):
        continuation.check()
    continuation.add_events([b'{"choices":[{"delta":{"content":"y"}}]}'])
    continuation.check()


def test_unread_events_of_a_long_stream_are_bounded() -> None:
    continuation = continuation_for(Engine.LLAMA, Call("/v1/completions", {"prompt": "Say:"}))
    raw = json.dumps({"choices": [{"text": "x ", "finish_reason": None}]}).encode()
    for _ in range(5000):
        continuation.add_events([raw])
    assert len(continuation._unread) < 1000
    assert continuation.text == "x " * 5000


def test_an_unknown_format_is_repeated_only_before_delivery() -> None:
    continuation = continuation_for(Engine.LLAMA, Call("/v1/responses", {}))
    assert not continuation.delivered
    continuation.add_events([b"{}"])
    with pytest.raises(NotResumable, match="/v1/responses"):
        continuation.check()
