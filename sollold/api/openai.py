"""OpenAI's dialect: ``/v1/*``, and llama-server's own routes beside it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from aiohttp import web

from sollold.api.body import as_type, read_object
from sollold.api.caller import caller_of
from sollold.api.fault_shape import Dialect
from sollold.api.infill import InfillForm, infill_of
from sollold.api.ollama import json_response
from sollold.api.ollama_request import need, no_reranker, parse_keep_alive, require_model
from sollold.api.openai_request import (
    ApplyTemplate,
    ChatCompletion,
    Completion,
    Detokenize,
    EmbeddingAsk,
    Infill,
    Rerank,
    Tokenize,
    chat_completion_body,
    check_tokens,
    completion_body,
    embedding_body,
    engine_body,
    ollama_body,
    shorten_embeddings,
)
from sollold.api.parts import Listed, Parts
from sollold.api.prefill import go_on
from sollold.api.prefix import prefix_of
from sollold.api.reply import Desk, Form, Reply
from sollold.api.route import Route
from sollold.api.shortening import Shortening
from sollold.api.sse import ChunkForm, PlainForm
from sollold.serving.ask import Ask, Call, Engine, Fault, Refusal


def model_object(listed: Listed) -> dict[str, Any]:
    """A model as ``/v1/models`` has it."""
    model = listed.model
    return {
        "id": model.name,
        "object": "model",
        "created": int(model.modified),
        "owned_by": "library" if model.source == "ollama" else "sollold",
        "nodes": list(listed.nodes),
    }


class OpenAiRoutes:
    """The handlers of OpenAI's dialect."""

    def __init__(self, parts: Parts, desk: Desk) -> None:
        self._parts = parts
        self._desk = desk

    def routes(self) -> list[Route]:
        """The table."""
        sse = ("application/json", "text/event-stream")

        def row(
            method: str, path: str, handler: Any, summary: str, body: type | None = None, **more: Any
        ) -> Route:
            return Route(method, path, handler, Dialect.OPENAI, summary, body, turn=body is not None, **more)

        return [
            row(
                "POST",
                "/v1/chat/completions",
                self.chat,
                "Answer a conversation",
                ChatCompletion,
                produces=sse,
            ),
            row("POST", "/v1/completions", self.completions, "Go on from a prompt", Completion, produces=sse),
            row("POST", "/v1/embeddings", self.embeddings, "Embeddings", EmbeddingAsk),
            row("GET", "/v1/models", self.models, "The models of the whole cluster"),
            row("GET", "/v1/models/{model:.+}", self.model, "One model"),
            row("POST", "/v1/rerank", self.rerank, "Order documents by a query", Rerank),
            row("POST", "/rerank", self.rerank, "Order documents by a query", Rerank),
            row("POST", "/tokenize", self.tokenize, "A text's tokens", Tokenize),
            row("POST", "/detokenize", self.detokenize, "The text of tokens", Detokenize),
            row("POST", "/infill", self.infill, "What stands between two texts", Infill, produces=sse),
            row(
                "POST", "/apply-template", self.apply_template, "The prompt of a conversation", ApplyTemplate
            ),
        ]

    async def _find(self, name: str) -> Listed:
        """The model named; without a name the one that is loaded, when it is the only one.

        Raises:
            Refusal: NOT_FOUND, AMBIGUOUS, BAD_REQUEST.
        """
        if not name.strip():
            loaded = {one.endpoint.model for one in self._parts.library.running()}
            if len(loaded) != 1:
                raise Refusal(Fault.BAD_REQUEST, "model is required")
            name = next(iter(loaded))
        return await self._parts.library.find(require_model(name))

    async def _give(
        self,
        request: web.Request,
        body: dict[str, Any],
        model: str,
        calls: dict[Engine, Call],
        form: Form,
        *,
        stream: bool = False,
        embedding: bool = False,
        shorten: bool = False,
        prefix: str = "",
    ) -> web.StreamResponse:
        caller = caller_of(request, body.get("priority"), body.get("timeout"))
        ask = Ask(
            id=caller.id,
            model=model,
            calls=calls,
            stream=stream,
            keep_alive=parse_keep_alive(body.get("keep_alive")),
            priority=caller.priority,
            client=caller.client,
            embedding=embedding,
            deadline=caller.deadline,
            prefix=prefix,
            explain=caller.explain,
        )
        desk = replace(self._desk, service=Shortening(self._desk.service)) if shorten else self._desk
        return await Reply(request, desk, ask, form).run()

    def _calls(
        self, listed: Listed, path: str, body: dict[str, Any], native: dict[str, Any]
    ) -> dict[Engine, Call]:
        """The same route at both engines: ``body`` for llama-server, ``native`` for Ollama."""
        calls = {Engine.OLLAMA: Call(path, ollama_body(native))}
        if not listed.model.only_ollama:
            calls[Engine.LLAMA] = Call(path, body)
        return calls

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """``/v1/chat/completions``."""
        body = await read_object(request)
        chat = as_type(body, ChatCompletion)
        listed = await self._find(chat.model)
        if chat.tools:
            need(listed.model, "tools", "tools")
        engine = chat_completion_body(body, chat, listed.model)
        begun = go_on(engine)
        calls = self._calls(listed, "/v1/chat/completions", engine, body)
        name = chat.model or listed.model.name
        prefix = prefix_of(body.get("messages"))
        return await self._give(
            request, body, name, calls, ChunkForm(begun), stream=bool(chat.stream), prefix=prefix
        )

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """``/v1/completions``."""
        body = await read_object(request)
        ask = as_type(body, Completion)
        listed = await self._find(ask.model)
        engine = completion_body(body, ask)
        calls = self._calls(listed, "/v1/completions", engine, body)
        name = ask.model or listed.model.name
        form = ChunkForm()
        if ask.suffix:
            need(listed.model, "insert", "a suffix")
            form = InfillForm(ask, name)
            if Engine.LLAMA in calls:
                calls[Engine.LLAMA] = Call("/infill", infill_of(engine, ask))
        prefix = prefix_of(ask.prompt)
        return await self._give(request, body, name, calls, form, stream=bool(ask.stream), prefix=prefix)

    async def embeddings(self, request: web.Request) -> web.StreamResponse:
        """``/v1/embeddings``."""
        body = await read_object(request)
        ask = as_type(body, EmbeddingAsk)
        listed = await self._find(ask.model)
        no_reranker(listed.model)
        calls = self._calls(listed, "/v1/embeddings", embedding_body(body, ask), body)
        form = PlainForm()
        if ask.dimensions is not None:
            calls = {engine: Call(call.path, embedding_body(body, ask)) for engine, call in calls.items()}
            form = PlainForm(lambda raw: shorten_embeddings(raw, ask))
        # As Ollama does under this route: a text that is too long is cut.
        return await self._give(
            request, body, ask.model or listed.model.name, calls, form, embedding=True, shorten=True
        )

    async def models(self, request: web.Request) -> web.Response:
        """``/v1/models``."""
        models = await self._parts.library.models()
        return json_response({"object": "list", "data": [model_object(one) for one in models]})

    async def model(self, request: web.Request) -> web.Response:
        """``/v1/models/{model}``."""
        name = require_model(request.match_info["model"])
        return json_response(model_object(await self._parts.library.find(name)))

    async def rerank(self, request: web.Request) -> web.StreamResponse:
        """``/v1/rerank``."""
        body = await read_object(request)
        ask = as_type(body, Rerank)
        if not ask.query or not (ask.documents or ask.texts):
            raise Refusal(Fault.BAD_REQUEST, "query and documents are required")
        need((await self._find(ask.model)).model, "rerank", "reranking")
        return await self._native(request, body, ask.model, "/v1/rerank", embedding=True)

    async def tokenize(self, request: web.Request) -> web.StreamResponse:
        """``/tokenize``."""
        body = await read_object(request)
        ask = as_type(body, Tokenize)
        if ask.content is None:
            raise Refusal(Fault.BAD_REQUEST, "content is required")
        check_tokens(ask.content, "content")
        return await self._native(request, body, ask.model, "/tokenize")

    async def detokenize(self, request: web.Request) -> web.StreamResponse:
        """``/detokenize``."""
        body = await read_object(request)
        ask = as_type(body, Detokenize)
        if ask.tokens is None:
            raise Refusal(Fault.BAD_REQUEST, "tokens is required")
        check_tokens(list(ask.tokens), "tokens")
        return await self._native(request, body, ask.model, "/detokenize")

    async def infill(self, request: web.Request) -> web.StreamResponse:
        """``/infill``."""
        body = await read_object(request)
        ask = as_type(body, Infill)
        if ask.input_prefix is None or ask.input_suffix is None:
            raise Refusal(Fault.BAD_REQUEST, "input_prefix and input_suffix are required")
        return await self._native(request, body, ask.model, "/infill", stream=bool(ask.stream))

    async def apply_template(self, request: web.Request) -> web.StreamResponse:
        """``/apply-template``."""
        body = await read_object(request)
        ask = as_type(body, ApplyTemplate)
        if not ask.messages:
            raise Refusal(Fault.BAD_REQUEST, "messages is required")
        return await self._native(request, body, ask.model, "/apply-template")

    async def _native(
        self,
        request: web.Request,
        body: dict[str, Any],
        model: str,
        path: str,
        *,
        stream: bool = False,
        embedding: bool = False,
    ) -> web.StreamResponse:
        """A route that only llama-server has."""
        listed = await self._find(model)
        if listed.model.only_ollama:
            raise Refusal(Fault.BAD_REQUEST, f"{path} needs llama.cpp; {listed.model.only_ollama}")
        calls = {Engine.LLAMA: Call(path, engine_body(body))}
        name = model or listed.model.name
        return await self._give(request, body, name, calls, PlainForm(), stream=stream, embedding=embedding)
