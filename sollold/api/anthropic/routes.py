"""Anthropic's dialect: ``/v1/messages``."""

from __future__ import annotations

from functools import partial

import msgspec
from aiohttp import web

from sollold.api.anthropic.events import MessageEvents
from sollold.api.anthropic.messages_ask import Messages, Tokens
from sollold.api.anthropic.request import messages_body, prompt_body
from sollold.api.anthropic.request_warnings import message_warnings, native_message_notes
from sollold.api.anthropic.tools import tool_warnings
from sollold.api.engine.calls import CHAT_PATH, chat_calls, ollama_body
from sollold.api.engine.count import count_ask, read_count
from sollold.api.engine.encoders import EventEncoder, PassThroughEncoder
from sollold.api.engine.fields import require_completion, require_model
from sollold.api.engine.ignored_fields import context_note
from sollold.api.engine.left_out import left_out_warnings
from sollold.api.engine.modelfile import without_modelfile
from sollold.api.engine.placement import find_placed
from sollold.api.engine.v1_ask import v1_ask
from sollold.api.http.body import as_type, read_object
from sollold.api.http.caller import prefix_of
from sollold.api.http.errors import Dialect
from sollold.api.http.exchange import exchange_of
from sollold.api.http.inflight import estimated_tokens
from sollold.api.http.response import Reply, ResponseContext
from sollold.api.http.route import Route
from sollold.api.http.services import AppServices
from sollold.serving.request import Call


class AnthropicRoutes:
    """The handlers of Anthropic's dialect."""

    def __init__(self, services: AppServices, context: ResponseContext) -> None:
        self._services = services
        self._context = context

    def routes(self) -> list[Route]:
        """Return the route table."""
        route = partial(Route, inference=True)
        sse = ("application/json", "text/event-stream")
        count = "/v1/messages/count_tokens"
        return [
            route("POST", "/v1/messages", self._messages, "Chat completion", Messages, produces=sse),
            route("POST", count, self._count_tokens, "Count the tokens of a prompt", Tokens),
        ]

    async def _messages(self, request: web.Request) -> web.StreamResponse:
        body = await read_object(request)
        parsed = as_type(body, Messages)
        listed = await find_placed(request, self._services, parsed.placement, parsed.model)
        parsed.model = parsed.model or listed.model.name
        require_completion(listed.model, "messages")
        engine = messages_body(parsed, listed.model)
        plain = messages_body(parsed, without_modelfile(listed.model))
        shared = {key: value for key, value in plain.items() if key not in _LLAMA_ONLY}
        native = ollama_body(shared, listed.model)
        messages = engine["messages"]
        notes = (*tool_warnings(parsed), *message_warnings(body), *left_out_warnings(messages))
        native["model"] = parsed.model
        native_notes = (*native_message_notes(plain), *context_note(parsed.num_ctx))
        call = Call(CHAT_PATH, native, (*notes, *native_notes))
        calls = partial(chat_calls, listed.model, llama=lambda: engine, ollama=call)
        # Not of the original messages: agents move a cache_control in them with each request.
        prefix = prefix_of(messages)
        ask, prepared = await v1_ask(request, body, parsed, listed, calls, stream=True, prefix=prefix)

        def encoder() -> EventEncoder:
            omits = parsed.thinking is not None and parsed.thinking.omitted
            id = exchange_of(request).id
            events = MessageEvents(
                parsed.model,
                parsed.stop_sequences or (),
                omit_thinking=omits,
                limit=parsed.max_tokens or 0,
                request=id,
                estimate=lambda: estimated_tokens(native),
            )
            return EventEncoder(events, Dialect.ANTHROPIC)

        gather = None if parsed.stream else encoder
        return await Reply(
            request, self._context, ask, encoder(), gather=gather, warnings=(*notes, *prepared.warnings)
        ).run()

    async def _count_tokens(self, request: web.Request) -> web.StreamResponse:
        """``/v1/messages/count_tokens``: loads the model, whose own tokenizer counts the tokens."""
        body = await read_object(request)
        parsed = as_type(body, Tokens)
        listed = await self._services.library.find(require_model(parsed.model))
        plain = {**prompt_body(parsed, without_modelfile(listed.model)), "model": parsed.model}
        native = {key: value for key, value in plain.items() if key not in _LLAMA_ONLY}
        engine = prompt_body(parsed, listed.model)
        ask = await count_ask(request, body, parsed, listed, engine, native)
        warnings = (*tool_warnings(parsed), *message_warnings(body))
        encoder = PassThroughEncoder(
            lambda raw: msgspec.json.encode({"input_tokens": read_count(raw)}), Dialect.ANTHROPIC
        )
        return await Reply(request, self._context, ask, encoder, warnings=warnings).run()


_LLAMA_ONLY = ("timings_per_token", "chat_template_kwargs", "reasoning_budget_tokens")
