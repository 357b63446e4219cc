"""Ollama's chat in llama-server's words, and its answer back. Pure.

There: ``/v1/chat/completions``. Back: its chunks become Ollama's lines, the last with all counts and
durations.
"""

from __future__ import annotations

import datetime
from typing import Any

import msgspec

from sollold.api.ollama_request import (
    Chat,
    Message,
    Options,
    image_part,
    need,
    response_format,
    sampling,
    thinking,
)
from sollold.api.prefill import NOTHING, Begun
from sollold.models.model import Model
from sollold.serving.ask import Fault, Refusal, Routing


def chat_body(chat: Chat, options: Options, model: Model) -> dict[str, Any]:
    """The body for ``/v1/chat/completions``.

    Raises:
        Refusal: BAD_REQUEST for what the model can't do, or what is malformed.
    """
    messages = [engine_message(message, model) for message in chat.messages or ()]
    if model.system and not any(message["role"] == "system" for message in messages):
        messages.insert(0, {"role": "system", "content": model.system})
    body: dict[str, Any] = {"model": model.name, "messages": tie_tool_results(messages), **sampling(options)}
    if chat.tools:
        need(model, "tools", "tools")
        body["tools"] = chat.tools
    add_shared(body, chat.format, chat.think, model)
    add_logprobs(body, chat.logprobs, chat.top_logprobs)
    add_stream(body, chat.stream is not False)
    return body


def add_shared(body: dict[str, Any], format_: Any, think: bool | str | None, model: Model) -> None:
    """Put ``format`` and ``think`` into the body."""
    wanted = response_format(format_)
    if wanted is not None:
        body["response_format"] = wanted
    body.update(thinking(think, model))


def add_logprobs(body: dict[str, Any], logprobs: bool | None, top: int | None) -> None:
    """Put ``logprobs`` into the body.

    Raises:
        Refusal: BAD_REQUEST when more are asked than there are.
    """
    rivals = logprobs_wanted(logprobs, top)
    if rivals:
        body["logprobs"] = True
        body["top_logprobs"] = rivals


def logprobs_wanted(logprobs: bool | None, top: int | None) -> int:
    """How many llama-server is to give for each token; 0: none.

    Raises:
        Refusal: BAD_REQUEST when more are asked than there are.
    """
    if top is not None and not 0 <= top <= 20:
        raise Refusal(Fault.BAD_REQUEST, "top_logprobs must be from 0 to 20")
    # llama-server takes 0 as none at all: one is asked for and left out again.
    return max(1, top or 0) if logprobs else 0


def add_stream(body: dict[str, Any], stream: bool) -> None:
    """Ask for a stream with counts, or for a whole answer."""
    body["stream"] = stream
    if stream:
        body["stream_options"] = {"include_usage": True}


def engine_message(message: Message, model: Model) -> dict[str, Any]:
    """One message as OpenAI has it.

    Raises:
        Refusal: BAD_REQUEST.
    """
    role = message.role.strip().lower()
    if role not in ("system", "user", "assistant", "tool", "developer"):
        raise Refusal(
            Fault.BAD_REQUEST,
            f"role {message.role[:40]!r} is not known; it is system, user, assistant or tool",
        )
    content: Any = message.content or ""
    if message.images:
        need(model, "vision", "images")
        content = [{"type": "text", "text": content}] if content else []
        content += [image_part(image) for image in message.images]
    out: dict[str, Any] = {"role": role, "content": content}
    if message.thinking:
        out["reasoning_content"] = message.thinking
    if message.tool_calls:
        out["tool_calls"] = [engine_tool_call(call, place) for place, call in enumerate(message.tool_calls)]
    if role == "tool":
        name = message.tool_name or message.name
        if name:
            out["name"] = name
        if message.tool_call_id:
            out["tool_call_id"] = message.tool_call_id
    return out


def engine_tool_call(call: dict[str, Any], place: int) -> dict[str, Any]:
    """A tool call with its arguments as a JSON string.

    Raises:
        Refusal: BAD_REQUEST when it names no function.
    """
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Refusal(Fault.BAD_REQUEST, "a tool call needs a function with a name")
    arguments = function.get("arguments", {})
    if not isinstance(arguments, str):
        arguments = msgspec.json.encode({} if arguments is None else arguments).decode()
    given = call.get("id")
    return {
        "id": given if isinstance(given, str) and given else f"call_{place}",
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def tie_tool_results(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give every tool result the id of the call it answers; Ollama's clients name only the tool, or nothing.

    Calls and results are matched by name, else in their order.
    """
    open_calls: list[tuple[str, str]] = []
    for message in messages:
        open_calls += [(call["id"], call["function"]["name"]) for call in message.get("tool_calls", ())]
        if message["role"] != "tool":
            continue
        named = message.get("name")
        wanted = message.get("tool_call_id")
        found = next(
            (c for c in open_calls if (c[0] == wanted if wanted else c[1] == named)),
            open_calls[0] if open_calls else None,
        )
        if found is not None:
            open_calls.remove(found)
            message.setdefault("tool_call_id", found[0])
            message.setdefault("name", found[1])
        else:
            message.setdefault("tool_call_id", "call_0")
    return messages


class Timings(msgspec.Struct):
    """llama-server's own account of an answer; milliseconds and tokens."""

    cache_n: int = 0
    prompt_n: int = 0
    prompt_ms: float = 0.0
    predicted_n: int = 0
    predicted_ms: float = 0.0


class Usage(msgspec.Struct):
    """Tokens of an answer."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


class ToolFunction(msgspec.Struct):
    """A piece of a call: the name comes first, the arguments bit by bit."""

    name: str | None = None
    arguments: str | dict[str, Any] | None = None


class ToolPiece(msgspec.Struct):
    """A piece of a tool call in a chunk, or a whole one in a message."""

    index: int | None = None
    id: str | None = None
    function: ToolFunction | None = None


class Said(msgspec.Struct):
    """``delta`` of a chunk, ``message`` of a whole answer."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolPiece] | None = None

    @property
    def says(self) -> bool:
        """It is more than a formality."""
        return bool(self.content or self.reasoning_content or self.reasoning or self.tool_calls)

    @property
    def thought(self) -> str:
        """The thinking, by whichever name the engine has for it."""
        return self.reasoning_content or self.reasoning or ""


class TokenLogprob(msgspec.Struct):
    """One token and its rivals."""

    token: str = ""
    logprob: float = 0.0
    bytes: list[int] | None = None
    top_logprobs: list[TokenLogprob] = []


class Logprobs(msgspec.Struct):
    """``logprobs`` of a choice."""

    content: list[TokenLogprob] | None = None


class Choice(msgspec.Struct):
    """One choice of a chunk or of a whole answer."""

    index: int = 0
    delta: Said | None = None
    message: Said | None = None
    text: str | None = None
    logprobs: Logprobs | None = None
    finish_reason: str | None = None


class Chunk(msgspec.Struct):
    """What the translators read of an engine's event; the rest is skipped without being built."""

    choices: list[Choice] = []
    usage: Usage | None = None
    timings: Timings | None = None
    error: Any = None


_chunk = msgspec.json.Decoder(Chunk)


def read_chunk(raw: bytes) -> Chunk:
    """An engine's event.

    Raises:
        Refusal: ENGINE, when the event is an error or can't be read.
    """
    try:
        chunk = _chunk.decode(raw)
    except msgspec.MsgspecError as error:
        raise Refusal(Fault.ENGINE, f"the engine sent what can't be read: {error}") from None
    if chunk.error is not None:
        message = chunk.error.get("message") if isinstance(chunk.error, dict) else chunk.error
        raise Refusal(Fault.ENGINE, f"the engine failed: {message}")
    return chunk


def timestamp() -> str:
    """Now, as Ollama writes it: RFC 3339 in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat().replace("+00:00", "Z")


def logprob_objects(logprobs: Logprobs | None, top: int) -> list[dict[str, Any]]:
    """Ollama's ``logprobs`` of an event, each with at most ``top`` rivals."""
    if logprobs is None or not logprobs.content:
        return []
    shown = []
    for token in logprobs.content:
        one: dict[str, Any] = {"token": token.token, "logprob": token.logprob, "bytes": token.bytes or []}
        if top:
            one["top_logprobs"] = [
                {"token": rival.token, "logprob": rival.logprob, "bytes": rival.bytes or []}
                for rival in token.top_logprobs[:top]
            ]
        shown.append(one)
    return shown


class ToolCalls:
    """Tool calls put together from their pieces; a whole one is handed out when the next begins."""

    def __init__(self) -> None:
        self._calls: dict[int, tuple[str, str, list[str]]] = {}
        self._given = 0

    def feed(self, pieces: list[ToolPiece] | None) -> None:
        """Take the pieces of one event."""
        for place, piece in enumerate(pieces or ()):
            index = piece.index if piece.index is not None else place
            name, id_, parts = self._calls.get(index, ("", "", []))
            function = piece.function or ToolFunction()
            if isinstance(function.arguments, dict):
                parts.append(msgspec.json.encode(function.arguments).decode())
            elif function.arguments:
                parts.append(function.arguments)
            self._calls[index] = (name or function.name or "", id_ or piece.id or "", parts)

    def take(self, *, finished: bool) -> list[dict[str, Any]]:
        """The calls that are whole and not yet handed out, in Ollama's form.

        One cut off in the middle of its arguments (the token limit was hit) is left out.
        """
        out = []
        indexes = sorted(self._calls)
        ready = indexes if finished else indexes[:-1]
        for index in ready[self._given :]:
            self._given += 1
            name, id_, parts = self._calls[index]
            try:
                arguments = msgspec.json.decode("".join(parts) or "{}")
            except msgspec.DecodeError:
                continue
            function = {"index": index, "name": name, "arguments": arguments}
            out.append({"id": id_, "function": function} if id_ else {"function": function})
        return out


class Account:
    """Counts and times of an answer, gathered from its events."""

    def __init__(self) -> None:
        self.finish = ""
        self.usage = Usage()
        self.timings = Timings()
        self._pieces = 0

    def feed(self, chunk: Chunk) -> None:
        """Take what an event says of them."""
        if chunk.usage is not None:
            self.usage = chunk.usage
        if chunk.timings is not None:
            self.timings = chunk.timings
        self._pieces += sum(choice.delta is not None and choice.delta.says for choice in chunk.choices)

    @property
    def tokens(self) -> int:
        """Tokens of the answer; the pieces so far, while no engine has said how many they were."""
        return self.usage.completion_tokens or self.timings.predicted_n or self._pieces

    def final(self, routing: Routing, total_seconds: float) -> dict[str, Any]:
        """The counts and nanoseconds of Ollama's last record."""
        timings, usage = self.timings, self.usage
        return {
            "done": True,
            "done_reason": done_reason(self.finish),
            "total_duration": int(total_seconds * 1e9),
            "load_duration": int(routing.load_ms * 1e6),
            "prompt_eval_count": usage.prompt_tokens or timings.prompt_n + timings.cache_n,
            "prompt_eval_duration": int(timings.prompt_ms * 1e6),
            "eval_count": self.tokens,
            "eval_duration": int(timings.predicted_ms * 1e6),
        }


def done_reason(finish: str) -> str:
    """Ollama's word for OpenAI's ``finish_reason``."""
    return "length" if finish == "length" else "stop"


class ChatLines:
    """Chunks of a chat become Ollama's records, one request's worth."""

    def __init__(self, model: str, top_logprobs: int = 0, begun: Begun = NOTHING) -> None:
        """``begun``: of the answer, by the caller."""
        self._model = model
        self._top = top_logprobs
        self._begun = begun
        self._tools = ToolCalls()
        self.account = Account()

    def record(self, message: dict[str, Any], *, done: bool = False) -> dict[str, Any]:
        """A record with its head."""
        return {
            "model": self._model,
            "created_at": timestamp(),
            "message": {"role": "assistant", "content": "", **message},
            "done": done,
        }

    def feed(self, raw: bytes) -> list[dict[str, Any]]:
        """The records for one event; most often one, for the engine's formal ones none.

        Raises:
            Refusal: ENGINE, when the event is an error.
        """
        chunk = read_chunk(raw)
        self.account.feed(chunk)
        records = []
        for choice in chunk.choices:
            said = choice.delta or choice.message or Said()
            message: dict[str, Any] = {}
            if said.content:
                message["content"] = said.content
            if said.thought:
                message["thinking"] = said.thought
            if said.tool_calls:
                self._tools.feed(said.tool_calls)
            if choice.finish_reason:
                self.account.finish = choice.finish_reason
            if said.tool_calls or choice.finish_reason:
                calls = self._tools.take(finished=bool(choice.finish_reason))
                if calls:
                    message["tool_calls"] = calls
            logprobs = logprob_objects(choice.logprobs, self._top)
            if message or logprobs:
                record = self.record(message)
                if logprobs:
                    record["logprobs"] = logprobs
                records.append(record)
        return records

    def end(self, routing: Routing, total_seconds: float) -> dict[str, Any]:
        """The last record of a stream."""
        return {**self.record({}, done=True), **self.account.final(routing, total_seconds)}

    def whole(self, raw: bytes, routing: Routing, total_seconds: float) -> dict[str, Any]:
        """The one record of an answer that is not streamed."""
        records = self.feed(self._begun.cut_from(raw))
        first = records[0] if records else self.record({})
        return {**first, **self.account.final(routing, total_seconds)}

    def empty(self) -> dict[str, Any]:
        """A record without content, not the last."""
        return self.record({})
