"""Converts requests of Ollama's generate for llama-server, and its answers back. Pure.

A prompt is one turn of a chat, so it goes to ``/v1/chat/completions`` with the model's own template. With
``raw`` or a ``template`` of the caller's it goes to ``/v1/completions``, with a ``suffix`` to ``/infill``
(unless the caller's template places the suffix itself).

``context`` carries state between calls: numbers that only the server interprets. Here they are a marker that
is no valid token, and the bytes of the conversation so far (compressed JSON), so they survive a reload and a
move to another node. Real tokens, from an Ollama, are prepended to the prompt unchanged.
"""

from __future__ import annotations

import zlib
from typing import Any

import msgspec

from sollold.api.engine.calls import CHAT_PATH
from sollold.api.engine.chunks import Delta, logprob_objects, read_chunk, read_infilled
from sollold.api.engine.fields import require_capability
from sollold.api.engine.messages import image_part
from sollold.api.engine.modelfile import own_messages
from sollold.api.http.json_bounds import TooManyValues
from sollold.api.http.json_text import check_values
from sollold.api.ollama.chat import add_logprobs, add_shared, add_stream, alternative_count
from sollold.api.ollama.ndjson import Lines
from sollold.api.ollama.request import Generate, Options, response_format, sampling, thinking
from sollold.api.ollama.template import render_template
from sollold.errors import bad_request
from sollold.models.model import Model
from sollold.serving.request import Call, Routing

_MARKER = -7301
_MAX_BYTES = 8 * 1024 * 1024
_MAX_PACKED = 1024 * 1024


class PackedTurn(msgspec.Struct, array_like=True):
    """One turn of a packed conversation."""

    role: str
    content: str


_turns = msgspec.json.Decoder(list[PackedTurn])


def is_packed(context: list[int] | None) -> bool:
    """Whether ``context`` was created by `pack_context`."""
    return bool(context) and context is not None and context[0] == _MARKER


def pack_context(turns: list[PackedTurn]) -> list[int]:
    """Return the end of a conversation, up to 2^20 characters, as the numbers of ``context``."""
    kept, room = [], _MAX_PACKED
    for turn in reversed(turns):
        if room > 0:
            kept.append(PackedTurn(turn.role, turn.content[-room:]))
            room -= len(turn.content)
    # At the fastest level, since this blocks the event loop.
    return [_MARKER, *zlib.compress(msgspec.json.encode(kept[::-1]), 1)]


def unpack_context(context: list[int]) -> list[PackedTurn]:
    """Return the conversation in a ``context`` from `pack_context`.

    Raises:
        Refusal: BAD_REQUEST if it was modified, or has more turns than a body may have lists.
    """
    try:
        packer = zlib.decompressobj()
        raw = packer.decompress(bytes(context[1:]), _MAX_BYTES)
        if not packer.eof:
            raise ValueError("too long or cut off")
        check_values(raw)
        return _turns.decode(raw)
    except (ValueError, zlib.error, msgspec.MsgspecError, RecursionError, TooManyValues):
        raise bad_request("invalid context: send it back exactly as received, or omit it") from None


def generate_call(generate: Generate, options: Options, model: Model) -> Call:
    """Return the call to llama-server.

    Raises:
        Refusal: BAD_REQUEST if the model can't do what is requested, or a field is malformed.
    """
    stream = generate.stream is not False
    prompt = generate.prompt or ""
    # Checked even if the model's template is not used: what the model can't do is refused.
    thinking(generate.think, model)
    if generate.raw and (generate.template or generate.system or generate.context):
        raise bad_request("raw mode does not support template, system, or context")
    if generate.suffix and (not generate.template or generate.raw):
        return _infill(generate, options, model, prompt)
    tokens = list(generate.context or ()) if not is_packed(generate.context) else []
    if generate.raw or generate.template or tokens:
        return _completion(generate, options, model, prompt, tokens)
    # An empty string counts as omitted: Go's clients can't omit a field.
    system = generate.system or model.system
    turns = _turns_before(generate, model, system)
    messages: list[dict[str, Any]] = [{"role": turn.role, "content": turn.content} for turn in turns]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    content: Any = prompt
    if generate.images:
        require_capability(model, "vision", "images")
        content = [{"type": "text", "text": prompt}] if prompt else []
        content += [image_part(image) for image in generate.images]
    messages.append({"role": "user", "content": content})
    body = {"model": model.name, "messages": messages, **sampling(options)}
    add_shared(body, generate.format, generate.think, model)
    add_logprobs(body, generate.logprobs, generate.top_logprobs)
    add_stream(body, stream)
    return Call(CHAT_PATH, body)


def _infill(generate: Generate, options: Options, model: Model, prompt: str) -> Call:
    require_capability(model, "insert", "insert")
    for name, value in (
        ("images", generate.images),
        ("a system prompt", generate.system),
        ("context", generate.context),
    ):
        if value:
            raise bad_request(
                f"{name} can't be combined with suffix: the model sees only the text before and after it; "
                "put it into the prompt"
            )
    body = {
        "model": model.name,
        "input_prefix": prompt,
        "input_suffix": generate.suffix,
        **sampling(options),
    }
    add_schema(body, generate.format)
    if alternatives := alternative_count(generate.logprobs, generate.top_logprobs):
        body["n_probs"] = alternatives
    body["stream"] = generate.stream is not False
    return Call("/infill", body)


def add_schema(body: dict[str, Any], format_: Any) -> None:
    """Put ``format`` into the body of a plain completion, which takes a schema instead of response_format."""
    value = response_format(format_)
    if value is not None:
        body["json_schema"] = value.get("json_schema", {}).get("schema", {"type": "object"})


def _completion(generate: Generate, options: Options, model: Model, prompt: str, tokens: list[int]) -> Call:
    if generate.images:
        raise bad_request("images need the model's own template; omit raw, template and token context")
    if generate.template:
        system = generate.system or model.system
        values = {"System": system, "Prompt": prompt, "Suffix": generate.suffix or ""}
        turns = [(turn.role, turn.content) for turn in _turns_before(generate, model, system)]
        prompt = render_template(generate.template, {**values, **_thought_values(generate.think)}, turns)
    body: dict[str, Any] = {
        "model": model.name,
        "prompt": [*tokens, prompt] if tokens else prompt,
        **sampling(options),
    }
    add_schema(body, generate.format)
    if alternatives := alternative_count(generate.logprobs, generate.top_logprobs):
        body["logprobs"] = alternatives
    add_stream(body, generate.stream is not False)
    return Call("/v1/completions", body)


def _turns_before(generate: Generate, model: Model, system: str) -> list[PackedTurn]:
    """Return the known turns before the prompt, without system turns if ``system`` is set."""
    if not generate.context:
        turns = [PackedTurn(message["role"], message["content"]) for message in own_messages(model)]
    else:
        turns = unpack_context(generate.context) if is_packed(generate.context) else []
    return [turn for turn in turns if turn.role != "system" or not system]


def _thought_values(think: bool | str | None) -> dict[str, str]:
    """Return the variables of Ollama's templates for ``think``."""
    enabled = think is True or (isinstance(think, str) and think.strip().lower() not in ("", "false", "none"))
    level = think.strip().lower() if isinstance(think, str) else ""
    return {
        "Think": "true" if enabled else "",
        "ThinkLevel": level if enabled and level != "true" else "",
        "IsThinkSet": "" if think is None else "true",
    }


class GenerateLines(Lines):
    """`Lines` of a generate request, by any of the three calls."""

    def __init__(
        self,
        model: str,
        path: str,
        turns: list[PackedTurn] | None = None,
        top_logprobs: int = 0,
        delivered: str = "",
    ) -> None:
        """``turns``: the conversation including the prompt, for ``context``; ``None`` to return no context;
        ``delivered``: the part of the answer that another node delivered.
        """
        super().__init__(model, top_logprobs)
        self._infill = path == "/infill"
        self._turns = turns
        self._parts = [delivered]

    def empty(self) -> dict[str, Any]:
        """Return a record with an empty response."""
        return self._record(response="")

    def feed(self, raw: bytes) -> list[dict[str, Any]]:
        """Return the records for one event of the call."""
        chunk = read_chunk(raw)
        self._account.feed(chunk)
        if self._infill:
            return self._feed_infill(raw)
        records = []
        for choice in chunk.choices:
            delta = choice.delta or choice.message or Delta(content=choice.text)
            if choice.finish_reason:
                self._account.finish = choice.finish_reason
            logprobs = logprob_objects(choice.logprobs, self._top)
            if delta.content or delta.thought or logprobs:
                record = self._record(response=delta.content or "")
                if delta.content:
                    self._parts.append(delta.content)
                if delta.thought:
                    record["thinking"] = delta.thought
                if logprobs:
                    record["logprobs"] = logprobs
                records.append(record)
        return records

    def _feed_infill(self, raw: bytes) -> list[dict[str, Any]]:
        event = read_infilled(raw)
        if event.finish:
            self._account.finish = event.finish
            self._account.usage.prompt_tokens = event.tokens_evaluated
            self._account.usage.completion_tokens = event.tokens_predicted
        logprobs = logprob_objects(event.logprobs, self._top)
        if not event.content and not logprobs:
            return []
        return [{**self._record(response=event.content), **({"logprobs": logprobs} if logprobs else {})}]

    def _closing(self, routing: Routing, total_seconds: float) -> dict[str, Any]:
        closing = super()._closing(routing, total_seconds)
        if self._turns is not None:
            closing["context"] = pack_context([*self._turns, PackedTurn("assistant", "".join(self._parts))])
        return closing


def turns_of(generate: Generate, call: Call, model: Model) -> list[PackedTurn] | None:
    """Return the conversation to keep in ``context``, including the prompt; ``None`` if none is returned."""
    if call.path == "/v1/completions" and generate.template:
        system = generate.system or model.system
        first = [PackedTurn("system", system)] if system else []
        return [*first, *_turns_before(generate, model, system), PackedTurn("user", generate.prompt or "")]
    if call.path != CHAT_PATH:
        return None
    turns = []
    for message in call.body["messages"]:
        content = message["content"]
        if not isinstance(content, str):
            content = "".join(part.get("text", "") for part in content)
        turns.append(PackedTurn(message["role"], content))
    return turns
