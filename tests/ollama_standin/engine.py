"""Translation of Ollama's API to a real llama-server and back.

As in Ollama, only documented fields are passed on.
"""

from __future__ import annotations

import json
import math
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from aiohttp import ClientResponse, ClientSession

_OPTIONS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seed",
    "stop",
    "repeat_penalty",
    "presence_penalty",
    "frequency_penalty",
)
_V1 = (
    "messages",
    "frequency_penalty",
    "presence_penalty",
    "response_format",
    "seed",
    "stop",
    "temperature",
    "top_p",
    "max_tokens",
    "tools",
    "reasoning_effort",
    "logprobs",
    "top_logprobs",
)


class EngineError(Exception):
    """The engine refused a request with ``status``."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Piece:
    """A part of an answer. The last part has a ``reason``."""

    text: str = ""
    thinking: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    reason: str = ""
    prompt: int = 0
    count: int = 0
    context: list[int] | None = None


async def chat(url: str, body: dict[str, Any]) -> AsyncGenerator[Piece, None]:
    """Answer ``/api/chat``."""
    ask = _shared(body) | {"messages": _messages(body["messages"])}
    if body.get("tools"):
        ask["tools"] = body["tools"]
    answer = _talk(url, ask)
    if body.get("template"):
        answer = _complete(url, _shared(body) | {"prompt": printed(body["template"], body["messages"])})
    async with aclosing(answer) as pieces:
        async for piece in pieces:
            yield piece


async def generate(url: str, body: dict[str, Any]) -> AsyncGenerator[Piece, None]:
    """Answer ``/api/generate``."""
    if body.get("suffix"):
        gap = {"input_prefix": body["prompt"], "input_suffix": body["suffix"]}
        async with aclosing(_complete(url, _shared(body) | gap, "/infill")) as pieces:
            async for piece in pieces:
                yield piece
        return
    user = {"role": "user", "content": body.get("prompt", ""), "images": body.get("images")}
    system = [{"role": "system", "content": body["system"]}] if body.get("system") else []
    turns = [*system, *body.get("before", ()), user]
    messages = _messages(turns)
    shown = printed(body["template"], turns) if body.get("template") else ""
    async with ClientSession(url) as session:
        if body.get("raw") or shown:
            prompt: Any = shown or body["prompt"]
        else:
            prompt = (await _post(session, "/apply-template", {"messages": messages}))["prompt"]
        tokens = (await _post(session, "/tokenize", {"content": prompt, "parse_special": True}))["tokens"]
        before = body.get("context") or []
        if body.get("raw") or shown or before:
            answer = _complete(url, _shared(body) | {"prompt": [*before, *tokens]})
        else:
            answer = _talk(url, _shared(body) | {"messages": messages})
        generated = ""
        async with aclosing(answer) as pieces:
            async for piece in pieces:
                generated += piece.text
                if piece.reason and not body.get("raw"):
                    added = (await _post(session, "/tokenize", {"content": generated}))["tokens"]
                    piece.context = [*before, *tokens, *added]
                yield piece


def printed(template: str, messages: list[dict[str, Any]]) -> str:
    """Render a conversation with a template of one exchange that only has field references."""
    out, values = "", {"System": "", "Prompt": "", "Response": ""}
    fields = {"system": "System", "user": "Prompt", "assistant": "Response"}
    for message in messages:
        if message["role"] != "assistant" and values["Response"]:
            out += _filled(template, values)
            values = dict.fromkeys(values, "")
        values[fields[message["role"]]] = message.get("content") or ""
    return out + _filled(template.split("{{ .Response }}")[0], values)


def _filled(template: str, values: dict[str, str]) -> str:
    for name, text in values.items():
        template = template.replace(f"{{{{ .{name} }}}}", text)
    return template


async def embed(url: str, texts: list[str], most: int, *, truncate: bool = True) -> list[list[float]]:
    """Return the engine's vectors. Texts of more than ``most`` tokens are truncated or refused with 400."""
    async with ClientSession(url) as session:
        given: list[list[int]] = []
        for text in texts:
            tokens = (await _post(session, "/tokenize", {"content": text, "add_special": True}))["tokens"]
            if len(tokens) > most and not truncate:
                raise EngineError(400, "the input length exceeds the context length")
            given.append(tokens[:most])
        answer = await _post(session, "/v1/embeddings", {"input": given})
    return [item["embedding"] for item in answer["data"]]


def normalized(vector: list[float], dimensions: int | None) -> list[float]:
    """Return the first ``dimensions`` of the vector, or all, normalized."""
    vector = vector[:dimensions] if dimensions else vector
    length = math.sqrt(sum(x * x for x in vector)) or 1.0
    return [x / length for x in vector]


async def v1_chat(url: str, body: dict[str, Any]) -> AsyncGenerator[Piece, None]:
    """Answer ``/v1/chat/completions``. Arguments of tool calls are strings here too."""
    ask = {key: body[key] for key in _V1 if body.get(key) is not None}
    for message in ask["messages"]:
        if "reasoning" in message:
            message["reasoning_content"] = message.pop("reasoning")
    if effort := ask.pop("reasoning_effort", None):
        ask |= _thinking(False if effort == "none" else effort)
    async with aclosing(_talk(url, ask)) as pieces:
        async for piece in pieces:
            yield piece


def _shared(body: dict[str, Any]) -> dict[str, Any]:
    options = body.get("options") or {}
    ask: dict[str, Any] = {key: options[key] for key in _OPTIONS if key in options}
    if options.get("num_predict", -1) >= 0:
        ask["max_tokens"] = options["num_predict"]
    shape = body.get("format")
    if shape == "json":
        ask["response_format"] = {"type": "json_object"}
    elif shape:
        ask["response_format"] = {"type": "json_schema", "json_schema": {"schema": shape}}
        ask["json_schema"] = shape
    if body.get("logprobs"):
        ask |= {"logprobs": True, "top_logprobs": body.get("top_logprobs") or 1}
    return ask | _thinking(body.get("think"))


def _thinking(think: bool | str | None) -> dict[str, Any]:
    if think is None:
        return {}
    words: dict[str, Any] = {"enable_thinking": think is not False}
    if isinstance(think, str):
        words["reasoning_effort"] = think
    return {"chat_template_kwargs": words}


def _messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    out = []
    for given in messages:
        message: dict[str, Any] = {"role": given["role"], "content": given.get("content", "")}
        if given.get("images"):
            urls = [f"data:image/png;base64,{image}" for image in given["images"]]
            parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
            message["content"] = [{"type": "text", "text": message["content"]}, *parts]
        if given.get("thinking"):
            message["reasoning_content"] = given["thinking"]
        if given.get("tool_calls"):
            message["tool_calls"] = [
                {
                    "id": f"call_{place}",
                    "type": "function",
                    "function": {
                        "name": call["function"]["name"],
                        "arguments": json.dumps(call["function"]["arguments"]),
                    },
                }
                for place, call in enumerate(given["tool_calls"])
            ]
        if given["role"] == "tool":
            message["tool_call_id"] = "call_0"
        out.append(message)
    return out


async def _talk(url: str, ask: dict[str, Any]) -> AsyncGenerator[Piece, None]:
    last = Piece(reason="stop")
    calls: dict[int, dict[str, Any]] = {}
    ask = {**ask, "stream": True, "stream_options": {"include_usage": True}}
    ask.pop("json_schema", None)
    async with aclosing(_events(url, "/v1/chat/completions", ask)) as events:
        async for event in events:
            if usage := event.get("usage"):
                last.prompt, last.count = usage["prompt_tokens"], usage["completion_tokens"]
            for choice in event.get("choices", ()):
                delta = choice.get("delta") or {}
                for part in delta.get("tool_calls") or ():
                    call = calls.setdefault(part["index"], {"name": "", "arguments": "", "id": ""})
                    call["id"] = call["id"] or part.get("id", "")
                    for key in ("name", "arguments"):
                        call[key] += part["function"].get(key) or ""
                if choice.get("finish_reason") == "length":
                    last.reason = "length"
                piece = Piece(
                    delta.get("content") or "",
                    delta.get("reasoning_content") or "",
                    logprobs=_logprobs((choice.get("logprobs") or {}).get("content")),
                )
                if piece.text or piece.thinking:
                    yield piece
    if calls:
        yield Piece(calls=[calls[index] for index in sorted(calls)])
    yield last


async def _complete(url: str, ask: dict[str, Any], path: str = "/completion") -> AsyncGenerator[Piece, None]:
    last = Piece(reason="stop")
    ask = {**ask, "stream": True}
    ask.pop("response_format", None)
    if "max_tokens" in ask:
        ask["n_predict"] = ask.pop("max_tokens")
    if ask.pop("logprobs", False):
        ask["n_probs"] = ask.pop("top_logprobs")
    async with aclosing(_events(url, path, ask)) as events:
        async for event in events:
            if event.get("stop"):
                last.reason = "length" if event.get("stop_type") == "limit" else "stop"
                last.prompt, last.count = event["tokens_evaluated"], event["tokens_predicted"]
            elif event.get("content"):
                yield Piece(event["content"], logprobs=_logprobs(event.get("completion_probabilities")))
    yield last


def _logprobs(given: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    keys = ("token", "logprob", "bytes")
    return [
        {key: token[key] for key in keys}
        | {"top_logprobs": [{key: rival[key] for key in keys} for rival in token["top_logprobs"]]}
        for token in given or ()
    ]


async def _events(url: str, path: str, ask: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
    async with ClientSession(url) as session:
        async with session.post(path, json=ask) as answer:
            await _check(answer)
            async for raw in answer.content:
                if raw.startswith(b"data: {"):
                    yield json.loads(raw[6:])


async def _post(session: ClientSession, path: str, body: dict[str, Any]) -> Any:
    async with session.post(path, json=body) as answer:
        await _check(answer)
        return await answer.json()


async def _check(answer: ClientResponse) -> None:
    if answer.status != 200:
        raise EngineError(answer.status, json.loads(await answer.read())["error"]["message"])
