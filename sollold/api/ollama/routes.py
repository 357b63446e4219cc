"""Ollama's dialect: the inference endpoints, and those about the server itself."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from aiohttp import web
from msgspec.structs import replace

from sollold.api.engine.calls import build_ask, calls_for, chat_calls, typed_body
from sollold.api.engine.embeddings import Embedder, as_json
from sollold.api.engine.fields import parse_keep_alive, require_completion, require_model
from sollold.api.engine.placement import find_placed
from sollold.api.engine.prepare import Prepared, prepare_format
from sollold.api.engine.truncate import TruncatingService
from sollold.api.http.access import require
from sollold.api.http.caller import Caller, caller_of, prefix_of
from sollold.api.http.off_loop import off_loop
from sollold.api.http.response import Reply, ResponseContext, json_response
from sollold.api.http.route import Route
from sollold.api.http.routing_text import routing_headers, routing_object
from sollold.api.http.services import AppServices
from sollold.api.ollama.chat import ChatLines, chat_body
from sollold.api.ollama.generate import GenerateLines, generate_call, is_packed, turns_of
from sollold.api.ollama.native import native_body
from sollold.api.ollama.ndjson import LineEncoder, Lines, LoadEncoder, LoadLines
from sollold.api.ollama.request import (
    Chat,
    Embed,
    Embeddings,
    Generate,
    Options,
    Shared,
    parse_options,
    read_as,
)
from sollold.api.ollama.request_warnings import option_warnings, request_warnings
from sollold.control.keys import Scope
from sollold.errors import Fault, Refusal, bad_request
from sollold.models.listing import Listed
from sollold.serving.request import Ask, Call, Engine

VERSION = "0.33.0"
"""Version of Ollama's API implemented here. Clients expect dotted integers, some at least 0.6.4."""


class OllamaRoutes:
    """The handlers of Ollama's dialect."""

    def __init__(self, services: AppServices, context: ResponseContext) -> None:
        self._services = services
        self._context = context
        self._embedder = Embedder(services.service)

    def routes(self) -> list[Route]:
        """Return the route table."""
        ask = partial(Route, inference=True)
        kinds = ("application/json", "application/x-ndjson")
        return [
            ask("POST", "/api/chat", self._chat, "Chat completion", Chat, produces=kinds),
            ask("POST", "/api/generate", self._generate, "Continue a prompt", Generate, produces=kinds),
            ask("POST", "/api/embed", self._embed, "Embeddings, normalised", Embed),
            ask("POST", "/api/embeddings", self._embeddings, "One embedding, not normalised", Embeddings),
            Route("POST", "/api/me", self._me, "Who is signed in at ollama.com: nobody", statuses=(401,)),
            Route("GET", "/api/status", self._status, "Whether Ollama's cloud is used: it is not"),
            Route("POST", "/api/signout", self._signout, "Sign out of ollama.com: nobody is signed in"),
            Route("GET", "/api/version", self._version, "The version of Ollama's API spoken here"),
        ]

    async def _version(self, request: web.Request) -> web.Response:
        return json_response({"version": VERSION})

    async def _me(self, request: web.Request) -> web.Response:
        response = json_response({"error": "unauthorized: this server has no accounts at ollama.com"})
        response.set_status(401)
        return response

    async def _status(self, request: web.Request) -> web.Response:
        return json_response({"cloud": {"disabled": True, "source": "none"}})

    async def _signout(self, request: web.Request) -> web.Response:
        return json_response({"status": "nobody is signed in: this server has no accounts at ollama.com"})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        started = time.monotonic()
        body, chat = await read_as(request, Chat)
        caller = caller_of(request, chat.priority, chat.timeout)
        listed = await find_placed(request, self._services, chat.placement, chat.model)
        options = parse_options(chat.options, listed.model)
        if not chat.messages:
            empty = ChatLines(chat.model).empty()
            return await self._load(request, caller, chat, listed, options, empty, started)
        require_completion(listed.model, "chat")
        ignored = request_warnings(body, chat)

        def build() -> tuple[Ask, Prepared]:
            calls, prepared = chat_calls(
                listed.model,
                llama=lambda: chat_body(chat, options, listed.model),
                ollama=Call("/api/chat", native_body(body, chat), ignored),
            )
            prefix = prefix_of(body.get("messages"))
            return self._ask(caller, chat, listed, options, calls, prefix=prefix), prepared

        ask, prepared = await off_loop(request, body, build)
        lines = ChatLines(chat.model, chat.top_logprobs or 0, prepared.prefix)
        warnings = (*ignored, *option_warnings(chat.options), *prepared.warnings)
        return await self._reply(request, ask, lines, chat, options, started, warnings)

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        started = time.monotonic()
        body, generate = await read_as(request, Generate)
        caller = caller_of(request, generate.priority, generate.timeout)
        if not generate.model.strip():
            # Ollama's own words and status.
            raise Refusal(Fault.NOT_FOUND, "model '' not found")
        listed = await find_placed(request, self._services, generate.placement, generate.model)
        options = parse_options(generate.options, listed.model)
        if not generate.prompt and not generate.suffix and not generate.images:
            empty = GenerateLines(generate.model, "").empty()
            return await self._load(request, caller, generate, listed, options, empty, started)
        require_completion(listed.model, "generate")
        packed = is_packed(generate.context)
        if packed and listed.model.only_ollama:
            raise bad_request(
                "this context was created by llama.cpp and the model is now served by Ollama, which can't "
                "read it; omit context, or use /api/chat"
            )
        ignored = request_warnings(body, generate)

        def build() -> tuple[Ask, Call | None, tuple[str, ...]]:
            native = native_body(body, generate)
            calls = calls_for(
                listed.model,
                llama=lambda: generate_call(generate, options, listed.model),
                ollama=None if packed else Call("/api/generate", native, ignored),
                operation="/api/generate",
            )
            call = calls.get(Engine.LLAMA)
            notes = prepare_format(call.body) if call is not None else ()
            prefix = prefix_of(generate.prompt)
            return self._ask(caller, generate, listed, options, calls, prefix=prefix), call, notes

        ask, call, notes = await off_loop(request, body, build)
        path, turns = (call.path, turns_of(generate, call, listed.model)) if call is not None else ("", None)
        delivered = generate.resume.content if generate.resume is not None else ""
        lines = GenerateLines(generate.model, path, turns, generate.top_logprobs or 0, delivered)
        warnings = (*ignored, *option_warnings(generate.options), *notes)
        return await self._reply(request, ask, lines, generate, options, started, warnings)

    def _ask(
        self,
        caller: Caller,
        shared: Shared,
        listed: Listed,
        options: Options,
        calls: dict[Engine, Call],
        *,
        load_only: bool = False,
        prefix: str = "",
    ) -> Ask:
        ask = build_ask(
            caller,
            shared.model,
            listed,
            calls,
            stream=shared.stream is not False,
            keep_alive=shared.keep_alive,
            context=options.num_ctx,
            load_only=load_only,
            prefix=prefix,
            placement=shared.placement,
        )
        return ask if load_only else replace(ask, delivered=shared.delivered())

    async def _reply(
        self,
        request: web.Request,
        ask: Ask,
        lines: Lines,
        shared: Shared,
        options: Options,
        started: float,
        warnings: tuple[str, ...],
    ) -> web.StreamResponse:
        encoder = LineEncoder(lines, started)
        context = self._context
        if shared.truncate is not False:
            context = replace(context, service=TruncatingService(context.service, options.num_keep or 0))
        return await Reply(request, context, ask, encoder, warnings=warnings).run()

    async def _load(
        self,
        request: web.Request,
        caller: Caller,
        shared: Shared,
        listed: Listed,
        options: Options,
        empty: dict[str, Any],
        started: float,
    ) -> web.StreamResponse:
        """Load the model for an empty request, or unload it if ``keep_alive`` is 0."""
        keep_alive = parse_keep_alive(shared.keep_alive)
        if keep_alive == 0:
            require(request, Scope.MODELS, "unloading a model")
        path = "/api/chat" if "message" in empty else "/api/generate"
        body: dict[str, Any] = {"model": shared.model, "stream": False}
        if keep_alive is not None:
            body["keep_alive"] = shared.keep_alive
        if shared.options:
            body["options"] = shared.options
        calls = {Engine.LLAMA: Call("/health", {}), Engine.OLLAMA: Call(path, body)}
        ask = self._ask(caller, shared, listed, options, calls, load_only=True)
        lines = LoadLines(empty, "unload" if keep_alive == 0 else "load")
        encoder = LoadEncoder(lines, started)
        return await Reply(request, self._context, ask, encoder).run()

    async def _embed(self, request: web.Request) -> web.Response:
        started = time.monotonic()
        body, embed = await read_as(request, Embed)
        caller = caller_of(request, embed.priority, embed.timeout)
        listed = await self._find_to_embed(embed.model)
        if not embed.input:
            return json_response({"model": embed.model, "embeddings": []})
        texts = [embed.input] if isinstance(embed.input, str) else embed.input
        ask = self._embedding_ask(caller, embed, listed)
        call = Call("/api/embed", typed_body(body, embed))
        with self._context.inflight.answering(request, ask) as live:
            embedded = await self._embedder.embed(
                ask, listed.model, texts, call, live, truncate=embed.truncate is not False
            )
        embedded.routing.warnings += request_warnings(body, embed)
        answer = embedded.native or {
            "model": embed.model,
            "embeddings": await as_json(embedded.vectors, embed.dimensions),
            "total_duration": int((time.monotonic() - started) * 1e9),
            "load_duration": int(embedded.routing.load_ms * 1e6),
            "prompt_eval_count": embedded.tokens,
        }
        answer["_routing"] = routing_object(embedded.routing, started)
        return json_response(answer, routing_headers(embedded.routing))

    async def _embeddings(self, request: web.Request) -> web.Response:
        started = time.monotonic()
        body, embed = await read_as(request, Embeddings)
        caller = caller_of(request, embed.priority, embed.timeout)
        listed = await self._find_to_embed(embed.model)
        if not embed.prompt:
            return json_response({"embedding": []})
        ask = self._embedding_ask(caller, embed, listed)
        call = Call("/api/embeddings", body)
        with self._context.inflight.answering(request, ask) as live:
            embedded = await self._embedder.embed(
                ask, listed.model, [embed.prompt], call, live, normalize=False
            )
        embedded.routing.warnings += request_warnings(body, embed)
        answer = embedded.native or {"embedding": embedded.vectors[0]}
        answer["_routing"] = routing_object(embedded.routing, started)
        return json_response(answer, routing_headers(embedded.routing))

    async def _find_to_embed(self, name: str) -> Listed:
        """Return the model; if there is none, fail with Ollama's own message, which clients match."""
        try:
            return await self._services.library.find(require_model(name))
        except Refusal as refusal:
            if refusal.fault is Fault.NOT_FOUND:
                message = f'model "{name}" not found, try pulling it first'
                raise Refusal(Fault.NOT_FOUND, message) from None
            raise

    def _embedding_ask(self, caller: Caller, embed: Embed | Embeddings, listed: Listed) -> Ask:
        """Return the request, without its calls."""
        options = parse_options(embed.options, listed.model)
        return build_ask(
            caller,
            embed.model,
            listed,
            {},
            keep_alive=embed.keep_alive,
            context=options.num_ctx,
            embedding=True,
        )
