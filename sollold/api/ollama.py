"""Ollama's dialect: ``/api/*``. The routes; what they say is in the ``ollama_*`` files."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from typing import Any

import msgspec
from aiohttp import web

from sollold.api.body import as_type, read_bytes, read_object
from sollold.api.caller import Caller, caller_of
from sollold.api.embedder import Embedder
from sollold.api.fault_shape import Dialect, refusal_bytes, refusal_object, status_of
from sollold.api.ollama_chat import ChatLines, chat_body
from sollold.api.ollama_create import Create, told
from sollold.api.ollama_embed import shortened
from sollold.api.ollama_form import LineForm, Lines, LoadForm, LoadLines
from sollold.api.ollama_generate import GenerateLines, generate_call, is_packed, turns_of
from sollold.api.ollama_models import ps, show, tags
from sollold.api.ollama_request import (
    Chat,
    Copy,
    Delete,
    Embed,
    Embeddings,
    Generate,
    Named,
    Options,
    Relayable,
    Shared,
    parse_keep_alive,
    parse_options,
    require_model,
)
from sollold.api.parts import Listed, Parts
from sollold.api.prefill import NOTHING, go_on
from sollold.api.prefix import prefix_of
from sollold.api.reply import JSON, NDJSON, Desk, Reply, routing_headers, routing_object
from sollold.api.route import Route
from sollold.api.shortening import Shortening
from sollold.serving.ask import Ask, Call, Engine, Fault, Refusal

log = logging.getLogger("sollold.api")

VERSION = "0.33.0"
"""Of Ollama's API that is spoken here. Clients ask for dotted integers, some for at least 0.6.4."""

_NO_RELAY = (
    "{what} needs an Ollama, and no node of this cluster has one that answers; start Ollama on a node, or "
    "put the GGUF file into a model folder (sollold.toml, [models] folders)"
)


def json_response(value: object, headers: dict[str, str] | None = None) -> web.Response:
    """``value`` as JSON."""
    return web.Response(body=msgspec.json.encode(value), headers={"Content-Type": JSON, **(headers or {})})


class OllamaRoutes:
    """The handlers of Ollama's dialect."""

    def __init__(self, parts: Parts, desk: Desk) -> None:
        self._parts = parts
        self._desk = desk
        self._embedder = Embedder(parts.service)

    def routes(self) -> list[Route]:
        """The table."""
        kinds = ("application/json", "application/x-ndjson")
        ollama = Dialect.OLLAMA

        def row(
            method: str, path: str, handler: Any, summary: str, body: type | None = None, **more: Any
        ) -> Route:
            return Route(method, path, handler, ollama, summary, body, **more)

        rows = [
            row("POST", "/api/chat", self.chat, "Answer a conversation", Chat, produces=kinds, turn=True),
            row(
                "POST",
                "/api/generate",
                self.generate,
                "Go on from a prompt",
                Generate,
                produces=kinds,
                turn=True,
            ),
            row("POST", "/api/embed", self.embed, "Embeddings, at length 1", Embed, turn=True),
            row(
                "POST",
                "/api/embeddings",
                self.embeddings,
                "One embedding, as it is (old)",
                Embeddings,
                turn=True,
            ),
            row("POST", "/api/show", self.show, "All that is known of a model", Named),
            row("POST", "/api/pull", self.pull, "Fetch a model", Named, produces=kinds),
            row("POST", "/api/push", self.relay, "Push a model through an Ollama", Relayable, produces=kinds),
            row(
                "POST",
                "/api/create",
                self.create,
                "Create a model in an Ollama, or a second name",
                Create,
                produces=kinds,
            ),
            row("POST", "/api/copy", self.copy, "Give a model a second name", Copy, produces=()),
            row("DELETE", "/api/delete", self.delete, "Remove what was fetched", Delete, produces=()),
            row("POST", "/api/blobs/{digest}", self.relay, "Give a blob to an Ollama", statuses=(201,)),
            row("HEAD", "/api/blobs/{digest}", self.relay, "Whether an Ollama has a blob"),
        ]
        for method in ("GET", "HEAD"):
            rows += [
                row(method, "/api/version", self.version, "The version of Ollama's API spoken here"),
                row(method, "/api/tags", self.tags, "The models of the whole cluster"),
                row(method, "/api/ps", self.ps, "The models that are loaded"),
            ]
        return rows

    async def version(self, request: web.Request) -> web.Response:
        """``/api/version``."""
        return json_response({"version": VERSION})

    async def tags(self, request: web.Request) -> web.Response:
        """``/api/tags``."""
        return json_response(tags(await self._parts.library.models()))

    async def ps(self, request: web.Request) -> web.Response:
        """``/api/ps``."""
        library = self._parts.library
        return json_response(ps(library.running(), await library.models(), time.time()))

    async def show(self, request: web.Request) -> web.Response:
        """``/api/show``."""
        named = as_type(await read_object(request), Named)
        listed = await self._parts.library.find(named.wanted)
        metadata = await self._parts.library.metadata(listed)
        return json_response(show(listed, metadata, verbose=bool(named.verbose)))

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """``/api/chat``."""
        started = time.monotonic()
        body = await read_object(request)
        chat = as_type(body, Chat)
        caller = caller_of(request, chat.priority, chat.timeout)
        listed = await self._parts.library.find(require_model(chat.model))
        options = parse_options(chat.options, listed.model)
        if not chat.messages:
            empty = ChatLines(chat.model).empty()
            return await self._load(request, caller, chat, options, empty, started)
        calls = {Engine.OLLAMA: Call("/api/chat", body)}
        begun = NOTHING
        if not listed.model.only_ollama:
            engine = chat_body(chat, options, listed.model)
            begun = go_on(engine)
            calls[Engine.LLAMA] = Call("/v1/chat/completions", engine)
        lines = ChatLines(chat.model, chat.top_logprobs or 0, begun)
        ask = self._ask(caller, chat, options, calls, prefix_of(body.get("messages")))
        return await self._reply(request, ask, lines, chat, options, started)

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """``/api/generate``."""
        started = time.monotonic()
        body = await read_object(request)
        generate = as_type(body, Generate)
        caller = caller_of(request, generate.priority, generate.timeout)
        listed = await self._parts.library.find(require_model(generate.model))
        options = parse_options(generate.options, listed.model)
        if not generate.prompt and not generate.suffix and not generate.images:
            empty = GenerateLines(generate.model, "").empty()
            return await self._load(request, caller, generate, options, empty, started)
        calls: dict[Engine, Call] = {}
        if not is_packed(generate.context):
            calls[Engine.OLLAMA] = Call("/api/generate", body)
        turns = None
        path = ""
        if not listed.model.only_ollama:
            call = generate_call(generate, options, listed.model)
            path, turns = call.path, turns_of(generate, call)
            calls[Engine.LLAMA] = call
        if not calls:
            raise Refusal(
                Fault.BAD_REQUEST,
                "this context was given by llama.cpp and the model is now served by Ollama, which can't "
                "read it; leave context out, or use /api/chat",
            )
        lines = GenerateLines(generate.model, path, turns, generate.top_logprobs or 0)
        ask = self._ask(caller, generate, options, calls, prefix_of(generate.prompt))
        return await self._reply(request, ask, lines, generate, options, started)

    def _ask(
        self, caller: Caller, shared: Shared, options: Options, calls: dict[Engine, Call], prefix: str
    ) -> Ask:
        return Ask(
            id=caller.id,
            model=require_model(shared.model),
            calls=calls,
            stream=shared.stream is not False,
            context=max(0, options.num_ctx or 0),
            keep_alive=parse_keep_alive(shared.keep_alive),
            priority=caller.priority,
            client=caller.client,
            deadline=caller.deadline,
            prefix=prefix,
            explain=caller.explain,
        )

    async def _reply(
        self, request: web.Request, ask: Ask, lines: Lines, shared: Shared, options: Options, started: float
    ) -> web.StreamResponse:
        form = LineForm(lines, started)
        desk = self._desk
        if shared.truncate is not False:
            desk = replace(desk, service=Shortening(desk.service, options.num_keep or 0))
        return await Reply(request, desk, ask, form).run()

    async def _load(
        self,
        request: web.Request,
        caller: Caller,
        shared: Shared,
        options: Options,
        empty: dict[str, Any],
        started: float,
    ) -> web.StreamResponse:
        """An empty request loads the model, or unloads it with ``keep_alive`` 0."""
        keep_alive = parse_keep_alive(shared.keep_alive)
        path = "/api/chat" if "message" in empty else "/api/generate"
        body: dict[str, Any] = {"model": shared.model, "stream": False}
        if keep_alive is not None:
            body["keep_alive"] = shared.keep_alive
        if shared.options:
            body["options"] = shared.options
        ask = Ask(
            id=caller.id,
            model=require_model(shared.model),
            calls={Engine.LLAMA: Call("/health", {}), Engine.OLLAMA: Call(path, body)},
            stream=shared.stream is not False,
            load_only=True,
            context=max(0, options.num_ctx or 0),
            keep_alive=keep_alive,
            priority=caller.priority,
            client=caller.client,
            deadline=caller.deadline,
            explain=caller.explain,
        )
        lines = LoadLines(empty, "unload" if keep_alive == 0 else "load")
        form = LoadForm(lines, started)
        return await Reply(request, self._desk, ask, form).run()

    async def embed(self, request: web.Request) -> web.Response:
        """``/api/embed``."""
        started = time.monotonic()
        body = await read_object(request)
        embed = as_type(body, Embed)
        caller = caller_of(request, embed.priority, embed.timeout)
        if embed.input is None:
            raise Refusal(Fault.BAD_REQUEST, "input is required: a text or a list of texts")
        if embed.dimensions is not None and embed.dimensions < 0:
            raise Refusal(Fault.BAD_REQUEST, "dimensions must not be negative")
        listed = await self._parts.library.find(require_model(embed.model))
        texts = [embed.input] if isinstance(embed.input, str) else embed.input
        if isinstance(embed.input, str) and not embed.input:
            texts = []
        if not texts:
            return json_response({"model": embed.model, "embeddings": []})
        if any(not text for text in texts):
            raise Refusal(Fault.BAD_REQUEST, "an input is empty; an empty text has no embedding")
        ask = self._embedding_ask(caller, embed, listed)
        call = Call("/api/embed", body)
        found = await self._embedder.embed(
            ask, listed.model, texts, call, truncate=embed.truncate is not False
        )
        answer = found.native or {
            "model": embed.model,
            "embeddings": [shortened(vector, embed.dimensions) for vector in found.vectors],
            "total_duration": int((time.monotonic() - started) * 1e9),
            "load_duration": int(found.routing.load_ms * 1e6),
            "prompt_eval_count": found.tokens,
        }
        answer["_routing"] = routing_object(found.routing, started)
        return json_response(answer, routing_headers(found.routing))

    async def embeddings(self, request: web.Request) -> web.Response:
        """``/api/embeddings``: one text, not normalised."""
        started = time.monotonic()
        body = await read_object(request)
        old = as_type(body, Embeddings)
        caller = caller_of(request, old.priority, old.timeout)
        listed = await self._parts.library.find(require_model(old.model))
        if not old.prompt:
            return json_response({"embedding": []})
        ask = self._embedding_ask(caller, old, listed)
        call = Call("/api/embeddings", body)
        found = await self._embedder.embed(ask, listed.model, [old.prompt], call, normalize=False)
        answer = found.native or {"embedding": found.vectors[0]}
        answer["_routing"] = routing_object(found.routing, started)
        return json_response(answer, routing_headers(found.routing))

    def _embedding_ask(self, caller: Caller, embed: Embed | Embeddings, listed: Listed) -> Ask:
        """All of it but the calls."""
        options = parse_options(embed.options, listed.model)
        return Ask(
            id=caller.id,
            model=require_model(embed.model),
            calls={},
            stream=False,
            context=max(0, options.num_ctx or 0),
            keep_alive=parse_keep_alive(embed.keep_alive),
            priority=caller.priority,
            client=caller.client,
            embedding=True,
            deadline=caller.deadline,
        )

    async def pull(self, request: web.Request) -> web.StreamResponse:
        """``/api/pull``."""
        named = as_type(await read_object(request), Named)
        name = named.wanted
        puller = self._parts.puller
        if puller is None:
            raise Refusal(Fault.BAD_REQUEST, "this node can't fetch models", status=501)
        steps = puller.pull(name)
        if named.stream is False:
            last: dict[str, Any] = {}
            async with contextlib.aclosing(steps) as rest:
                async for step in rest:
                    last = step
            return json_response(last)
        return await self._steps(request, steps)

    async def _steps(
        self, request: web.Request, steps: AsyncGenerator[dict[str, Any], None]
    ) -> web.StreamResponse:
        """Progress as lines. A refusal before the first is a proper status, a later one has it: ``code``."""
        response = web.StreamResponse(headers={"Content-Type": NDJSON, "X-Accel-Buffering": "no"})
        async with contextlib.aclosing(steps) as rest:
            first = await anext(rest, None)
            await response.prepare(request)
            try:
                if first is not None:
                    await response.write(msgspec.json.encode(first) + b"\n")
                async for step in rest:
                    await response.write(msgspec.json.encode(step) + b"\n")
            except Refusal as refusal:
                said = {**refusal_object(Dialect.OLLAMA, refusal), "code": status_of(refusal)}
                await response.write(msgspec.json.encode(said) + b"\n")
            except (ConnectionError, GeneratorExit):
                raise
            except Exception:
                log.exception("fetching a model failed")
                failed = Refusal(
                    Fault.INTERRUPTED, "fetching failed for a reason the node did not expect; see its log"
                )
                await response.write(refusal_bytes(Dialect.OLLAMA, failed) + b"\n")
        await response.write_eof()
        return response

    async def relay(self, request: web.Request) -> web.StreamResponse:
        """Push, create and blobs: an Ollama's own business, passed on as it is."""
        relay = self._parts.relay
        path = request.path if request.path.startswith("/api/") else request.path.removeprefix("/v1")
        if path.startswith("/api/blobs/") and not _is_digest(request.match_info["digest"]):
            raise Refusal(Fault.BAD_REQUEST, "a blob's name is sha256: and 64 hex digits")
        body: AsyncIterator[bytes] | bytes = request.content.iter_any()
        model = ""
        if not path.startswith("/api/blobs/"):
            named = as_type(await read_object(request), Relayable)
            body, model = await read_bytes(request), named.needed(path)
        answer = await relay.forward(request.method, path, body, model) if relay is not None else None
        if answer is None:
            raise Refusal(Fault.BAD_REQUEST, _NO_RELAY.format(what=path), status=501)
        try:
            response = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.kind or JSON})
            await response.prepare(request)
            try:
                async with contextlib.aclosing(answer.chunks()) as pieces:
                    async for piece in pieces:
                        await response.write(piece)
            except Refusal as refusal:
                # Its status is out: the error is the last line, as Ollama itself says it.
                if request.method != "HEAD":
                    await response.write(refusal_bytes(Dialect.OLLAMA, refusal) + b"\n")
            await response.write_eof()
            return response
        finally:
            await answer.close()

    async def create(self, request: web.Request) -> web.StreamResponse:
        """``/api/create``: an Ollama's business; of a model that none has, a second name."""
        body = await read_object(request)
        try:
            wanted = as_type(body, Create)
            base = await self._parts.library.find(wanted.needed) if wanted.renames else None
        except Refusal:
            # An Ollama may know more, and says itself what is wrong.
            base = None
        if base is None or base.model.source == "ollama":
            try:
                return await self.relay(request)
            except Refusal as refusal:
                if refusal.status != 501:
                    raise
                wanted = as_type(body, Create)
                if not wanted.renames:
                    raise
            base = await self._parts.library.find(wanted.needed)
        await self._parts.library.copy(
            base.model.name, require_model(wanted.model or wanted.name), told=told(wanted, base.model)
        )
        done = {"status": "success"}
        if wanted.stream is False:
            return json_response(done)
        return web.Response(body=msgspec.json.encode(done) + b"\n", headers={"Content-Type": NDJSON})

    async def copy(self, request: web.Request) -> web.Response:
        """``/api/copy``."""
        named = as_type(await read_object(request), Copy)
        source, destination = require_model(named.source), require_model(named.destination)
        await self._parts.library.copy(source, destination, named.nodes or ())
        return web.Response()

    async def delete(self, request: web.Request) -> web.Response:
        """``/api/delete``."""
        named = as_type(await read_object(request), Delete)
        await self._parts.library.delete(named.wanted, named.nodes or ())
        return web.Response()


def _is_digest(text: str) -> bool:
    kind, _, digits = text.replace("-", ":", 1).partition(":")
    return kind == "sha256" and len(digits) == 64 and all(c in "0123456789abcdef" for c in digits)
