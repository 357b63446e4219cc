"""Converts requests of Ollama's chat for llama-server, and its answers back. Pure.

Requests go to ``/v1/chat/completions``; its chunks become Ollama's lines, the last with all counts and
durations.
"""

from __future__ import annotations

from typing import Any

from sollold.api.engine.chunks import Delta, ToolCalls, logprob_objects, read_chunk
from sollold.api.engine.continue_message import NO_PREFIX, AnswerPrefix
from sollold.api.engine.conversation import results_in_order
from sollold.api.engine.fields import require_capability
from sollold.api.engine.messages import image_part, link_tool_results
from sollold.api.engine.modelfile import with_modelfile
from sollold.api.engine.tools import normalize_tool_call, normalize_tools
from sollold.api.ollama.ndjson import Lines
from sollold.api.ollama.request import Chat, Message, Options, response_format, sampling, thinking
from sollold.models.model import Model
from sollold.serving.request import Routing


def chat_body(chat: Chat, options: Options, model: Model) -> dict[str, Any]:
    """Return the body for ``/v1/chat/completions``.

    Raises:
        Refusal: BAD_REQUEST if the model can't do what is requested, or a field is malformed.
    """
    messages = [engine_message(message, model) for message in chat.messages or ()]
    messages = results_in_order(link_tool_results(with_modelfile(messages, model)))
    body: dict[str, Any] = {"model": model.name, "messages": messages, **sampling(options)}
    if chat.tools:
        require_capability(model, "tools", "tools")
        body["tools"] = normalize_tools(chat.tools)
    add_shared(body, chat.format, chat.think, model)
    add_logprobs(body, chat.logprobs, chat.top_logprobs)
    add_stream(body, chat.stream is not False)
    return body


def engine_message(message: Message, model: Model) -> dict[str, Any]:
    """Return one message in OpenAI's form.

    Raises:
        Refusal: BAD_REQUEST.
    """
    # Any other role is left to the template, as in Ollama.
    role = {"function": "tool", "": "user"}.get(role := message.role.strip().lower(), role)
    content: Any = message.content or ""
    if message.images:
        require_capability(model, "vision", "images")
        content = [{"type": "text", "text": content}] if content else []
        content += [image_part(image) for image in message.images]
    out: dict[str, Any] = {"role": role, "content": content}
    if message.thinking:
        out["reasoning_content"] = message.thinking
    if message.tool_calls:
        out["tool_calls"] = [
            normalize_tool_call(call, index) for index, call in enumerate(message.tool_calls)
        ]
    if role == "tool":
        name = message.tool_name or message.name
        if name:
            out["name"] = name
        if message.tool_call_id:
            out["tool_call_id"] = message.tool_call_id
    return out


def add_shared(body: dict[str, Any], format_: Any, think: bool | str | None, model: Model) -> None:
    """Put ``format`` and ``think`` into the body."""
    value = response_format(format_)
    if value is not None:
        body["response_format"] = value
    body.update(thinking(think, model))


def add_logprobs(body: dict[str, Any], logprobs: bool | None, top: int | None) -> None:
    """Put ``logprobs`` into the body."""
    alternatives = alternative_count(logprobs, top)
    if alternatives:
        body["logprobs"] = True
        body["top_logprobs"] = alternatives


def alternative_count(logprobs: bool | None, top: int | None) -> int:
    """Return the number of alternatives to request per token from llama-server; 0 for no probabilities."""
    # llama-server takes 0 for no probabilities at all, so one is requested and dropped again.
    return max(1, top or 0) if logprobs else 0


def add_stream(body: dict[str, Any], stream: bool) -> None:
    """Request a stream with its usage, or a whole answer."""
    body["stream"] = stream
    if stream:
        body["stream_options"] = {"include_usage": True}


class ChatLines(Lines):
    """`Lines` of a chat."""

    def __init__(self, model: str, top_logprobs: int = 0, prefix: AnswerPrefix = NO_PREFIX) -> None:
        """``prefix``: the beginning of the answer, sent by the caller."""
        super().__init__(model, top_logprobs)
        self._prefix = prefix
        self._tools = ToolCalls()

    def empty(self) -> dict[str, Any]:
        """Return a record with an empty message."""
        return self._record(message={"role": "assistant", "content": ""})

    def feed(self, raw: bytes) -> list[dict[str, Any]]:
        """Return the records for one chunk."""
        chunk = read_chunk(raw)
        self._account.feed(chunk)
        records = []
        for choice in chunk.choices:
            delta = choice.delta or choice.message or Delta()
            message: dict[str, Any] = {}
            if delta.content:
                message["content"] = delta.content
            if delta.thought:
                message["thinking"] = delta.thought
            if delta.tool_calls:
                self._tools.feed(delta.tool_calls)
            if choice.finish_reason:
                self._account.finish = choice.finish_reason
            if delta.tool_calls or choice.finish_reason:
                calls = self._tools.completed(finished=bool(choice.finish_reason))
                if calls:
                    message["tool_calls"] = calls
            logprobs = logprob_objects(choice.logprobs, self._top)
            if message or logprobs:
                record = self._record(message={"role": "assistant", "content": "", **message})
                if logprobs:
                    record["logprobs"] = logprobs
                records.append(record)
        return records

    def whole(self, raw: bytes, routing: Routing, total_seconds: float) -> dict[str, Any]:
        """Return the only record, without the beginning that the caller sent."""
        return super().whole(self._prefix.cut_from(raw), routing, total_seconds)
