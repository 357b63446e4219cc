"""What OpenAI's clients send, and the little that llama-server wants otherwise. Pure."""

from __future__ import annotations

import base64
import struct
from typing import Any

import msgspec

from sollold.api.ollama_embed import shortened
from sollold.models.model import Model
from sollold.serving.ask import Fault, Refusal


class StreamOptions(msgspec.Struct, kw_only=True):
    """``stream_options``."""

    include_usage: bool | None = None


class Sampling(msgspec.Struct, kw_only=True):
    """The fields that chat and completions have in common. The rest passes on unread."""

    model: str = ""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    priority: int | str | None = None
    timeout: float | str | None = None
    keep_alive: float | str | None = None


class ChatCompletion(Sampling, kw_only=True):
    """``POST /v1/chat/completions``."""

    messages: list[dict[str, Any]] | None = None
    max_completion_tokens: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    parallel_tool_calls: bool | None = None


class Completion(Sampling, kw_only=True):
    """``POST /v1/completions``."""

    prompt: str | list[Any] | None = None
    suffix: str | None = None
    echo: bool | None = None
    best_of: int | None = None
    logprobs: int | None = None


class EmbeddingAsk(msgspec.Struct, kw_only=True):
    """``POST /v1/embeddings``."""

    model: str = ""
    input: str | list[Any] | None = None
    encoding_format: str | None = None
    dimensions: int | None = None
    priority: int | str | None = None
    timeout: float | str | None = None
    keep_alive: float | str | None = None


class Rerank(msgspec.Struct, kw_only=True):
    """``POST /v1/rerank``."""

    model: str = ""
    query: str | None = None
    documents: list[str] | None = None
    texts: list[str] | None = None
    top_n: int | None = None


class Tokenize(msgspec.Struct, kw_only=True):
    """``POST /tokenize``."""

    model: str = ""
    content: str | list[Any] | None = None
    add_special: bool | None = None
    parse_special: bool | None = None
    with_pieces: bool | None = None


class Detokenize(msgspec.Struct, kw_only=True):
    """``POST /detokenize``."""

    model: str = ""
    tokens: list[int] | None = None


class Infill(msgspec.Struct, kw_only=True):
    """``POST /infill``: llama-server's own."""

    model: str = ""
    input_prefix: str | None = None
    input_suffix: str | None = None
    prompt: str | None = None
    input_extra: list[dict[str, Any]] | None = None
    stream: bool | None = None


class ApplyTemplate(msgspec.Struct, kw_only=True):
    """``POST /apply-template``."""

    model: str = ""
    messages: list[dict[str, Any]] | None = None


OURS = ("priority", "timeout", "keep_alive", "id_slot")
"""Fields that are not the engine's business; ``id_slot`` would let a caller take another's place."""


def engine_body(body: dict[str, Any]) -> dict[str, Any]:
    """``body`` without our own fields and without nulls, which mean "not named"."""
    return {key: value for key, value in body.items() if value is not None and key not in OURS}


def ollama_body(body: dict[str, Any]) -> dict[str, Any]:
    """`engine_body` for an Ollama, whose words are ``reasoning`` and ``max_tokens``."""
    out = engine_body(body)
    limit = out.pop("max_completion_tokens", None)
    if limit is not None:
        out.setdefault("max_tokens", limit)
    messages = out.get("messages")
    if isinstance(messages, list):
        out["messages"] = [_reasoned(message) for message in messages]
    return out


def _reasoned(message: Any) -> Any:
    if not isinstance(message, dict) or "reasoning_content" not in message:
        return message
    named = {key: value for key, value in message.items() if key != "reasoning_content"}
    return {"reasoning": message["reasoning_content"], **named}


def chat_completion_body(body: dict[str, Any], ask: ChatCompletion, model: Model) -> dict[str, Any]:
    """The body for llama-server's ``/v1/chat/completions``.

    Raises:
        Refusal: BAD_REQUEST.
    """
    if not ask.messages:
        raise Refusal(Fault.BAD_REQUEST, "messages is required: a list with at least one message")
    check_counts(ask)
    if ask.top_logprobs is not None and not 0 <= ask.top_logprobs <= 20:
        raise Refusal(Fault.BAD_REQUEST, "top_logprobs must be from 0 to 20")
    if ask.top_logprobs is not None and not ask.logprobs:
        raise Refusal(Fault.BAD_REQUEST, "top_logprobs needs logprobs to be true")
    out = engine_body(body)
    out["messages"] = [_message(message, model) for message in ask.messages]
    if model.system and not any(m.get("role") in ("system", "developer") for m in ask.messages):
        out["messages"].insert(0, {"role": "system", "content": model.system})
    _tool_choice(out, ask)
    if ask.logprobs and not ask.top_logprobs:
        # llama-server takes 0 as none at all.
        out["top_logprobs"] = 1
    kind = (ask.response_format or {}).get("type")
    if kind not in (None, "text", "json_object", "json_schema"):
        raise Refusal(Fault.BAD_REQUEST, "response_format.type is text, json_object or json_schema")
    return out


def check_counts(ask: Sampling) -> None:
    """Refuse numbers that make no sense, before an engine does it less clearly.

    Raises:
        Refusal: BAD_REQUEST.
    """
    if ask.n is not None and ask.n < 1:
        raise Refusal(Fault.BAD_REQUEST, "n must be at least 1")
    if ask.temperature is not None and ask.temperature < 0:
        raise Refusal(Fault.BAD_REQUEST, "temperature must not be negative")


_PARTS = ("text", "image_url", "input_audio", "input_video", "video_url")


def _message(message: dict[str, Any], model: Model) -> dict[str, Any]:
    out = {key: value for key, value in message.items() if value is not None}
    role = out.get("role")
    if not isinstance(role, str):
        raise Refusal(Fault.BAD_REQUEST, "every message needs a role")
    if "reasoning" in out and "reasoning_content" not in out:
        out["reasoning_content"] = out.pop("reasoning")
    calls = out.get("tool_calls")
    if not calls:
        out.pop("tool_calls", None)
    content = out.get("content")
    if content is None:
        out["content"] = ""
    elif isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in _PARTS:
                raise Refusal(
                    Fault.BAD_REQUEST, f"a part of a message is {str(kind)[:40]!r}, not {', '.join(_PARTS)}"
                )
            if kind == "text" and not isinstance(part.get("text"), str):
                raise Refusal(Fault.BAD_REQUEST, "a part of type 'text' needs a text")
            if kind == "image_url":
                _check_image(part, model)
    elif not isinstance(content, str):
        raise Refusal(Fault.BAD_REQUEST, "a message's content is a text or a list of parts")
    return out


def _check_image(part: dict[str, Any], model: Model) -> None:
    if "vision" not in model.capabilities:
        raise Refusal(Fault.BAD_REQUEST, f'"{model.name}" does not support images')
    image = part.get("image_url")
    if isinstance(image, str):
        part["image_url"] = image = {"url": image}
    url = image.get("url") if isinstance(image, dict) else None
    if not isinstance(url, str) or not url.startswith(("data:", "http://", "https://")):
        raise Refusal(Fault.BAD_REQUEST, "an image_url needs a url: data:image/…;base64,… or http(s)://…")


def _tool_choice(out: dict[str, Any], ask: ChatCompletion) -> None:
    """A choice of one function, which llama-server overlooks: leave only that one, and require it."""
    choice = ask.tool_choice
    if not isinstance(choice, dict):
        return
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else choice.get("name")
    tools = [tool for tool in ask.tools or () if _tool_name(tool) == name]
    if not tools:
        raise Refusal(
            Fault.BAD_REQUEST, f"tool_choice names {str(name)[:60]!r}, which is not among the tools"
        )
    out["tools"] = tools
    out["tool_choice"] = "required"


def _tool_name(tool: dict[str, Any]) -> object:
    function = tool.get("function")
    return function.get("name") if isinstance(function, dict) else None


def completion_body(body: dict[str, Any], ask: Completion) -> dict[str, Any]:
    """The body for llama-server's ``/v1/completions``.

    Raises:
        Refusal: BAD_REQUEST.
    """
    if ask.prompt is None or ask.prompt == []:
        raise Refusal(Fault.BAD_REQUEST, "prompt is required")
    check_counts(ask)
    check_tokens(ask.prompt, "prompt")
    if ask.echo:
        raise Refusal(Fault.BAD_REQUEST, "echo is not supported; put the prompt before the answer yourself")
    if ask.best_of is not None and ask.best_of > max(1, ask.n or 1):
        raise Refusal(Fault.BAD_REQUEST, "best_of is not supported; ask for n answers and choose")
    out = engine_body(body)
    for name in ("echo", "best_of", "suffix"):
        out.pop(name, None)
    return out


def check_tokens(prompt: str | list[Any], what: str) -> None:
    """Refuse what is neither text nor tokens nor a list of these.

    Raises:
        Refusal: BAD_REQUEST.
    """
    if isinstance(prompt, str):
        return

    def sound(one: object) -> bool:
        return isinstance(one, str) or (
            isinstance(one, int) and not isinstance(one, bool) and 0 <= one < 2**31
        )

    for one in prompt:
        if not sound(one) and not (isinstance(one, list) and one and all(sound(part) for part in one)):
            raise Refusal(Fault.BAD_REQUEST, f"{what} is a text, a list of texts, or tokens")


def embedding_body(body: dict[str, Any], ask: EmbeddingAsk) -> dict[str, Any]:
    """The body for llama-server's ``/v1/embeddings``.

    Raises:
        Refusal: BAD_REQUEST.
    """
    if not ask.input:
        raise Refusal(Fault.BAD_REQUEST, "input is required: a text or a list of texts")
    check_tokens(ask.input, "input")
    texts = [ask.input] if isinstance(ask.input, str) else ask.input
    if any(one == "" for one in texts):
        raise Refusal(Fault.BAD_REQUEST, "an input is empty; an empty text has no embedding")
    if ask.encoding_format not in (None, "float", "base64"):
        raise Refusal(Fault.BAD_REQUEST, "encoding_format is float or base64")
    if ask.dimensions is not None and ask.dimensions < 1:
        raise Refusal(Fault.BAD_REQUEST, "dimensions must be at least 1")
    out = engine_body(body)
    if out.pop("dimensions", None) is not None:
        out["encoding_format"] = "float"
    return out


def shorten_embeddings(raw: bytes, ask: EmbeddingAsk) -> bytes:
    """An answer of ``/v1/embeddings`` cut to ``dimensions``, which llama-server doesn't know.

    Raises:
        Refusal: ENGINE.
    """
    try:
        answer = msgspec.json.decode(raw)
        for one in answer["data"]:
            vector = shortened(one["embedding"], ask.dimensions)
            if ask.encoding_format == "base64":
                one["embedding"] = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
            else:
                one["embedding"] = vector
    except (msgspec.DecodeError, KeyError, TypeError):
        raise Refusal(Fault.ENGINE, "the engine's embeddings can't be read") from None
    return msgspec.json.encode(answer)


def both_reasonings(raw: bytes) -> bytes:
    """An event whose thinking is under both names, ``reasoning_content`` and ``reasoning``.

    Only events that speak of it are read; a token of the answer costs a search in its bytes.
    """
    if b'"reasoning' not in raw:
        return raw
    try:
        event = msgspec.json.decode(raw)
        for choice in event["choices"]:
            said = choice.get("delta") or choice.get("message") or {}
            if "reasoning_content" in said:
                said["reasoning"] = said["reasoning_content"]
            elif "reasoning" in said:
                said["reasoning_content"] = said["reasoning"]
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
        return raw
    return msgspec.json.encode(event)
