"""``/v1/responses``: OpenAI's newer form. Nothing is kept here, so an answer has no afterlife by its id."""

from __future__ import annotations

import msgspec
from aiohttp import web

from sollold.api.body import as_type, read_object
from sollold.api.caller import caller_of
from sollold.api.fault_shape import Dialect, refusal_object
from sollold.api.ollama_request import parse_keep_alive, require_model
from sollold.api.openai_request import ollama_body
from sollold.api.parts import Parts
from sollold.api.prefill import go_on
from sollold.api.prefix import prefix_of
from sollold.api.reply import SSE, Desk, Reply
from sollold.api.responses_events import Event, ResponseEvents
from sollold.api.responses_request import ResponseAsk, response_body
from sollold.api.route import Route
from sollold.api.sse import comment
from sollold.serving.ask import Ask, Call, Engine, Refusal, Routing, Waiting


class ResponseForm:
    """`Form` of a response."""

    dialect = Dialect.OPENAI
    content_type = SSE
    finished = False

    def __init__(self, events: ResponseEvents) -> None:
        self._events = events

    def begin(self, routing: Routing) -> bytes:
        """It is created and in progress."""
        return _encode(self._events.start())

    def event(self, raw: bytes) -> bytes:
        """The events for one chunk."""
        return _encode(self._events.feed(raw))

    def end(self, routing: Routing) -> bytes:
        """The events that end it."""
        return _encode(self._events.end()) + b"data: [DONE]\n\n"

    def fail(self, refusal: Refusal) -> bytes:
        """The events of the error."""
        return _encode(self._events.fail(refusal, refusal_object(Dialect.OPENAI, refusal)["error"]))

    def keep_alive(self, waiting: Waiting) -> bytes:
        """A comment."""
        return comment(waiting)

    def whole(self, raw: bytes, routing: Routing) -> bytes:
        """The response, after all its events."""
        return msgspec.json.encode(self._events.response())


def _encode(events: list[Event]) -> bytes:
    return b"".join(
        [
            b"event: " + event["type"].encode() + b"\ndata: " + msgspec.json.encode(event) + b"\n\n"
            for event in events
        ]
    )


class ResponsesRoutes:
    """The handler."""

    def __init__(self, parts: Parts, desk: Desk) -> None:
        self._parts = parts
        self._desk = desk

    def routes(self) -> list[Route]:
        """The table."""
        kinds = ("application/json", "text/event-stream")
        text = "Answer, in the newer form"
        return [
            Route(
                "POST",
                "/v1/responses",
                self.create,
                Dialect.OPENAI,
                text,
                ResponseAsk,
                produces=kinds,
                turn=True,
            ),
        ]

    async def create(self, request: web.Request) -> web.StreamResponse:
        """``POST /v1/responses``."""
        body = await read_object(request)
        ask = as_type(body, ResponseAsk)
        listed = await self._parts.library.find(require_model(ask.model))
        engine = response_body(ask, listed.model)
        calls = {Engine.OLLAMA: Call("/v1/chat/completions", ollama_body({**engine, "model": ask.model}))}
        if not listed.model.only_ollama:
            go_on(engine)
            calls[Engine.LLAMA] = Call("/v1/chat/completions", engine)
        caller = caller_of(request, ask.priority, ask.timeout)
        wish = Ask(
            id=caller.id,
            model=require_model(ask.model),
            calls=calls,
            stream=True,
            keep_alive=parse_keep_alive(ask.keep_alive),
            priority=caller.priority,
            client=caller.client,
            deadline=caller.deadline,
            prefix=prefix_of(engine["messages"]),
            explain=caller.explain,
        )

        def form() -> ResponseForm:
            return ResponseForm(ResponseEvents(ask))

        return await Reply(request, self._desk, wish, form(), gather=None if ask.stream else form).run()
