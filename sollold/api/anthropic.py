"""Anthropic's dialect: ``/v1/messages``."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from sollold.api.anthropic_events import Event, MessageEvents
from sollold.api.anthropic_request import Messages, Tokens, messages_body, prompt_body
from sollold.api.body import as_type, read_object
from sollold.api.caller import caller_of
from sollold.api.fault_shape import Dialect, refusal_bytes
from sollold.api.ollama_request import parse_keep_alive, require_model
from sollold.api.openai_request import engine_body, ollama_body
from sollold.api.parts import Parts
from sollold.api.prefill import OF_LLAMA
from sollold.api.prefix import prefix_of
from sollold.api.reply import SSE, Desk, Reply
from sollold.api.route import Route
from sollold.api.sse import PlainForm, comment
from sollold.serving.ask import Ask, Call, Engine, Fault, Refusal, Routing, Waiting


class MessageForm:
    """`Form` of a message."""

    dialect = Dialect.ANTHROPIC
    content_type = SSE

    def __init__(self, events: MessageEvents) -> None:
        self._events = events

    @property
    def finished(self) -> bool:
        """A stop sequence was met."""
        return self._events.stopped

    def begin(self, routing: Routing) -> bytes:
        """Nothing: the first chunk knows more."""
        return b""

    def event(self, raw: bytes) -> bytes:
        """The events for one chunk."""
        return _encode(self._events.feed(raw))

    def end(self, routing: Routing) -> bytes:
        """The events that end it."""
        return _encode(self._events.end())

    def fail(self, refusal: Refusal) -> bytes:
        """The error as an event."""
        return b"event: error\ndata: " + refusal_bytes(Dialect.ANTHROPIC, refusal) + b"\n\n"

    def keep_alive(self, waiting: Waiting) -> bytes:
        """A comment."""
        return comment(waiting)

    def whole(self, raw: bytes, routing: Routing) -> bytes:
        """The message, after all its events."""
        return msgspec.json.encode(self._events.message())


def _encode(events: list[Event]) -> bytes:
    return b"".join(
        [
            b"event: " + event["type"].encode() + b"\ndata: " + msgspec.json.encode(event) + b"\n\n"
            for event in events
        ]
    )


class AnthropicRoutes:
    """The handlers of Anthropic's dialect."""

    def __init__(self, parts: Parts, desk: Desk) -> None:
        self._parts = parts
        self._desk = desk

    def routes(self) -> list[Route]:
        """The table."""
        dialect = Dialect.ANTHROPIC
        sse = ("application/json", "text/event-stream")
        count = "/v1/messages/count_tokens"
        return [
            Route(
                "POST",
                "/v1/messages",
                self.messages,
                dialect,
                "Answer a conversation",
                Messages,
                produces=sse,
                turn=True,
            ),
            Route(
                "POST", count, self.count_tokens, dialect, "How many tokens a prompt has", Tokens, turn=True
            ),
        ]

    async def messages(self, request: web.Request) -> web.StreamResponse:
        """``/v1/messages``."""
        body = await read_object(request)
        ask = as_type(body, Messages)
        listed = await self._parts.library.find(require_model(ask.model))
        engine = messages_body(ask, listed.model)
        native = ollama_body({key: value for key, value in engine.items() if key not in _LLAMA_ONLY})
        native["model"] = ask.model
        calls = {Engine.OLLAMA: Call("/v1/chat/completions", native)}
        if not listed.model.only_ollama:
            calls[Engine.LLAMA] = Call("/v1/chat/completions", engine)

        def form() -> MessageForm:
            return MessageForm(MessageEvents(ask.model, ask.stop_sequences or ()))

        wish = self._ask(request, body, calls, stream=True, prefix=prefix_of(body.get("messages")))
        return await Reply(request, self._desk, wish, form(), gather=None if ask.stream else form).run()

    async def count_tokens(self, request: web.Request) -> web.StreamResponse:
        """``/v1/messages/count_tokens``: the model's own tokenizer counts, so it is loaded."""
        body = await read_object(request)
        ask = as_type(body, Tokens)
        listed = await self._parts.library.find(require_model(ask.model))
        if listed.model.only_ollama:
            raise Refusal(Fault.BAD_REQUEST, f"counting tokens needs llama.cpp; {listed.model.only_ollama}")
        call = Call("/v1/chat/completions/input_tokens", engine_body(prompt_body(ask, listed.model)))
        wish = self._ask(request, body, {Engine.LLAMA: call}, stream=False)
        return await Reply(request, self._desk, wish, PlainForm(_counted)).run()

    def _ask(
        self,
        request: web.Request,
        body: dict[str, Any],
        calls: dict[Engine, Call],
        *,
        stream: bool,
        prefix: str = "",
    ) -> Ask:
        caller = caller_of(request, body.get("priority"), body.get("timeout"))
        return Ask(
            id=caller.id,
            model=require_model(body["model"]),
            calls=calls,
            stream=stream,
            keep_alive=parse_keep_alive(body.get("keep_alive")),
            priority=caller.priority,
            client=caller.client,
            deadline=caller.deadline,
            prefix=prefix,
            explain=caller.explain,
        )


_LLAMA_ONLY = ("timings_per_token", "chat_template_kwargs", "reasoning_budget_tokens", *OF_LLAMA)


class _Count(msgspec.Struct):
    input_tokens: int


def _counted(raw: bytes) -> bytes:
    try:
        return msgspec.json.encode({"input_tokens": msgspec.json.decode(raw, type=_Count).input_tokens})
    except msgspec.MsgspecError:
        raise Refusal(Fault.ENGINE, "the engine's count can't be read") from None
