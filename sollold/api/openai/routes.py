"""OpenAI's dialect: ``/v1/*``, and llama-server's own endpoints."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from aiohttp import web
from msgspec.structs import replace

from sollold.api.engine.calls import (
    CHAT_PATH,
    calls_for,
    chat_calls,
    engine_body,
    ollama_body,
    typed_body,
)
from sollold.api.engine.continue_message import AnswerPrefix
from sollold.api.engine.encoders import PassThroughEncoder
from sollold.api.engine.fields import refuse_reranker, require_capability, require_completion, require_model
from sollold.api.engine.left_out import left_out_warnings
from sollold.api.engine.placement import V1Fields, prepare_placement
from sollold.api.engine.prepare import Prepared, normalize_chat, prepare_format
from sollold.api.engine.truncate import TruncatingService
from sollold.api.engine.v1_ask import v1_ask
from sollold.api.http.body import as_type, read_object
from sollold.api.http.caller import prefix_of
from sollold.api.http.encoder import Encoder
from sollold.api.http.response import Reply, ResponseContext, json_response
from sollold.api.http.route import Route
from sollold.api.http.services import AppServices
from sollold.api.openai.constraints import with_own_constraints
from sollold.api.openai.embeddings import (
    EmbeddingAsk,
    convert_embeddings,
    embedding_body,
    embedding_warnings,
    native_embedding_notes,
)
from sollold.api.openai.gathered_choices import GatheredChoices, has_several_prompts, streamed
from sollold.api.openai.infill import infill_body, read_infilled_piece
from sollold.api.openai.llama_sampling import with_llamas_names, with_options
from sollold.api.openai.pages import MODEL_PAGES, anthropic_model_object, model_object, model_page
from sollold.api.openai.raw_completion import raw_generate, read_generated
from sollold.api.openai.request import (
    ApplyTemplate,
    ChatCompletion,
    Completion,
    Detokenize,
    Infill,
    Tokenize,
    chat_completion_body,
    check_in_vocabulary,
    check_pieces,
    check_tokens,
    checked_chat,
    completion_body,
    native_chat_body,
)
from sollold.api.openai.request_warnings import (
    chat_warnings,
    completion_warnings,
    llama_warnings,
    native_chat_notes,
    native_completion_notes,
)
from sollold.api.openai.rerank import Rerank, rerank_body, with_documents
from sollold.api.openai.responses_request import input_as_chat
from sollold.api.openai.sse import ChunkEncoder, SummedUsage
from sollold.api.openai.text_completion import CompletionEncoder
from sollold.errors import bad_request
from sollold.models.listing import Listed
from sollold.serving.request import Call, Engine


class OpenAiRoutes:
    """The handlers of OpenAI's dialect."""

    def __init__(self, services: AppServices, context: ResponseContext) -> None:
        self._services = services
        self._context = context

    def routes(self) -> list[Route]:
        """Return the route table."""
        sse = ("application/json", "text/event-stream")
        ask = partial(Route, inference=True)
        stream = partial(ask, produces=sse)
        return [
            stream("POST", "/v1/chat/completions", self._chat, "Chat completion", ChatCompletion),
            stream("POST", "/v1/completions", self._completions, "Continue a prompt", Completion),
            ask("POST", "/v1/embeddings", self._embeddings, "Embeddings", EmbeddingAsk),
            Route(
                "GET",
                "/v1/models",
                self._models,
                "The models of the whole cluster",
                query=MODEL_PAGES,
                string_query=("after_id", "before_id"),
            ),
            Route("GET", "/v1/models/{model:.+}", self._model, "One model"),
            ask("POST", "/v1/rerank", self._rerank, "Rank documents by relevance to a query", Rerank),
            ask("POST", "/rerank", self._rerank, "Rank documents by relevance to a query", Rerank),
            ask("POST", "/tokenize", self._tokenize, "Convert text to tokens", Tokenize),
            ask("POST", "/detokenize", self._detokenize, "Convert tokens to text", Detokenize),
            stream("POST", "/infill", self._infill, "Fill in the text between a prefix and a suffix", Infill),
            ask("POST", "/apply-template", self._apply_template, "Apply a chat template", ApplyTemplate),
        ]

    async def _find(self, request: web.Request, ask: V1Fields) -> Listed:
        """Return the model in the file that ``placement`` names, else the named one; without a name the
        loaded one, if exactly one is loaded.

        Raises:
            Refusal: NOT_FOUND, AMBIGUOUS, BAD_REQUEST.
        """
        name = await prepare_placement(request, self._services, ask.placement) or ask.model
        if not name.strip():
            loaded = {instance.endpoint.model for instance in self._services.library.running()}
            if len(loaded) != 1:
                raise bad_request("model is required", field="model")
            name = next(iter(loaded))
        return await self._services.library.find(require_model(name))

    async def _respond(
        self,
        request: web.Request,
        body: dict[str, Any],
        parsed: V1Fields,
        listed: Listed,
        calls: Callable[[], tuple[dict[Engine, Call], Prepared]],
        encoder: Callable[[AnswerPrefix], Encoder],
        *,
        stream: bool = False,
        embedding: bool = False,
        prefix: str = "",
        warnings: tuple[str, ...] = (),
        gathers: bool = False,
    ) -> web.StreamResponse:
        """Answer a request; ``calls``: see `v1_ask`."""
        ask, prepared = await v1_ask(
            request, body, parsed, listed, calls, stream=stream, embedding=embedding, prefix=prefix
        )
        reply_context = self._context
        if embedding:
            # On these endpoints text that is too long is truncated, as Ollama does.
            reply_context = replace(reply_context, service=TruncatingService(reply_context.service))
        make_encoder = partial(encoder, prepared.prefix)
        all_warnings = (*warnings, *prepared.warnings)
        return await Reply(
            request,
            reply_context,
            ask,
            make_encoder(),
            gather=make_encoder if gathers else None,
            warnings=all_warnings,
        ).run()

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body, ignored = with_own_constraints(with_options(await read_object(request)), chat=True)
        chat = as_type(body, ChatCompletion)
        ignored += chat_warnings(body, chat)
        listed = await self._find(request, chat)
        require_completion(listed.model, "chat")
        if body.get("input") and not chat.messages:
            body = input_as_chat(body, listed.model)
            chat = as_type(body, ChatCompletion)
        if chat.tools or chat.functions:
            require_capability(listed.model, "tools", "tools")
        choices = chat.n or 1
        gathers = choices > 1 and not chat.stream
        if gathers:
            body = streamed(body)
            chat = as_type(body, ChatCompletion)
        checked = checked_chat(body, chat, listed.model)
        native = native_chat_body(checked, chat, listed.model)
        messages = native["messages"]
        notes = (*ignored, *left_out_warnings(messages))
        call = Call(CHAT_PATH, native, (*notes, *native_chat_notes(body, chat, native)))
        llama = partial(chat_completion_body, checked, chat, listed.model)

        def encoder(prefix: AnswerPrefix) -> Encoder:
            summed = SummedUsage(choices, counted=chat.counted) if choices > 1 else None
            name = chat.model or listed.model.name
            legacy = chat.uses_functions
            chunks = ChunkEncoder(
                name,
                prefix,
                counted=chat.counted,
                summed=summed,
                calls_function=legacy and not gathers,
                alternatives=(chat.top_logprobs or 0) if chat.logprobs else None,
            )
            return GatheredChoices(chunks, calls_function=legacy) if gathers else chunks

        return await self._respond(
            request,
            body,
            chat,
            listed,
            partial(chat_calls, listed.model, llama=llama, ollama=call),
            encoder,
            stream=bool(chat.stream),
            prefix=prefix_of(body.get("messages")),
            warnings=notes,
            gathers=gathers,
        )

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body, ignored = with_own_constraints(await read_object(request), chat=False)
        ask = as_type(body, Completion)
        ignored += completion_warnings(body)
        listed = await self._find(request, ask)
        require_completion(listed.model, "completions")
        several = (ask.n or 1) > 1 or has_several_prompts(ask.prompt)
        gathers = several and not ask.stream and not ask.suffix
        if gathers:
            body = streamed(body)
            ask = as_type(body, Completion)
        engine = completion_body(body, ask, listed.model)
        name = ask.model or listed.model.name
        if ask.suffix:
            require_capability(listed.model, "insert", "a suffix")

        def calls() -> tuple[dict[Engine, Call], Prepared]:
            prepared = Prepared(warnings=prepare_format(engine))
            notes = (*ignored, *native_completion_notes(body, ask))
            call, native = Call("/v1/completions", engine), raw_generate(engine, ask, listed.model, notes)
            if ask.suffix:
                call = Call("/infill", infill_body(engine, ask))
                native = Call("/v1/completions", ollama_body(typed_body(body, ask), listed.model), notes)
            built = calls_for(listed.model, llama=lambda: call, ollama=native, operation="/v1/completions")
            return built, prepared

        def encoder(_: AnswerPrefix) -> Encoder:
            if ask.suffix:
                return CompletionEncoder(ask, name, ChunkEncoder(name), Engine.LLAMA, read_infilled_piece)
            # llama-server puts the usage into the last chunk with text, whether requested or not.
            summed = SummedUsage(max(1, ask.n or 1), counted=ask.counted) if ask.stream else None
            chunks = ChunkEncoder(name, summed=summed)
            encoder = CompletionEncoder(ask, name, chunks, Engine.OLLAMA, read_generated)
            return GatheredChoices(encoder) if gathers else encoder

        return await self._respond(
            request,
            body,
            ask,
            listed,
            calls,
            encoder,
            stream=bool(ask.stream),
            prefix=prefix_of(ask.prompt),
            warnings=ignored,
            gathers=gathers,
        )

    async def _embeddings(self, request: web.Request) -> web.StreamResponse:
        body = await read_object(request)
        ask = as_type(body, EmbeddingAsk)
        listed = await self._find(request, ask)
        refuse_reranker(listed.model)
        call = Call("/v1/embeddings", embedding_body(body, ask))
        change = None
        native_body = ollama_body(typed_body(body, ask)) if ask.dimensions is None else call.body
        native = Call(call.path, native_body, native_embedding_notes(body, ask))
        if ask.dimensions is not None or ask.encoding_format == "base64":
            change = partial(convert_embeddings, ask=ask)
        # An Ollama takes no tokens, and they can't be converted to text here.
        texts = isinstance(ask.input, str) or all(isinstance(part, str) for part in ask.input or ())
        ollama = native if texts else None
        calls = calls_for(listed.model, llama=lambda: call, ollama=ollama, operation="an input of tokens")
        return await self._respond(
            request,
            body,
            ask,
            listed,
            lambda: (calls, Prepared()),
            lambda _: PassThroughEncoder(change),
            embedding=True,
            warnings=embedding_warnings(body),
        )

    async def _models(self, request: web.Request) -> web.Response:
        models = [listed for listed in await self._services.library.models() if not listed.model.unusable]
        if "anthropic-version" in request.headers:
            return json_response(model_page([anthropic_model_object(m) for m in models], request.query))
        names = self._services.library.node_names
        return json_response({"object": "list", "data": [model_object(listed, names) for listed in models]})

    async def _model(self, request: web.Request) -> web.Response:
        name = require_model(request.match_info["model"])
        listed = await self._services.library.find(name)
        if "anthropic-version" in request.headers:
            return json_response(anthropic_model_object(listed))
        # Under the requested name, as an Ollama does: clients compare the two.
        return json_response({**model_object(listed, self._services.library.node_names), "id": name})

    async def _rerank(self, request: web.Request) -> web.StreamResponse:
        body = await read_object(request)
        ask = as_type(body, Rerank)
        engine = rerank_body(body, ask)
        listed = await self._find(request, ask)
        require_capability(listed.model, "rerank", "reranking")
        change = None
        if ask.return_documents and ask.documents:
            change = partial(with_documents, documents=engine["documents"])
        path = "/v1/rerank"
        return await self._llama_only(request, engine, listed, path, ask, embedding=True, change=change)

    async def _tokenize(self, request: web.Request) -> web.StreamResponse:
        body = await read_object(request)
        ask = as_type(body, Tokenize)
        if ask.content is None:
            raise bad_request("content is required")
        check_tokens(ask.content, "content")
        if ask.with_pieces:
            check_pieces(ask.content)
        return await self._llama_only(request, body, await self._find(request, ask), "/tokenize", ask)

    async def _detokenize(self, request: web.Request) -> web.StreamResponse:
        body = await read_object(request)
        ask = as_type(body, Detokenize)
        if ask.tokens is None:
            raise bad_request("tokens is required")
        check_tokens(list(ask.tokens), "tokens")
        listed = await self._find(request, ask)
        check_in_vocabulary(ask.tokens, listed.model)
        return await self._llama_only(request, body, listed, "/detokenize", ask)

    async def _infill(self, request: web.Request) -> web.StreamResponse:
        body = await read_object(request)
        ask = as_type(body, Infill)
        if ask.input_prefix is None or ask.input_suffix is None:
            raise bad_request("input_prefix and input_suffix are required")
        return await self._llama_only(
            request,
            with_llamas_names(typed_body(body, ask), ask),
            await self._find(request, ask),
            "/infill",
            ask,
            stream=bool(ask.stream),
        )

    async def _apply_template(self, request: web.Request) -> web.StreamResponse:
        body = await read_object(request)
        ask = as_type(body, ApplyTemplate)
        if not ask.messages:
            raise bad_request("messages is required")
        body = normalize_chat({**body, "messages": ask.messages, "tools": ask.tools})
        return await self._llama_only(request, body, await self._find(request, ask), "/apply-template", ask)

    async def _llama_only(
        self,
        request: web.Request,
        body: dict[str, Any],
        listed: Listed,
        path: str,
        parsed: V1Fields,
        *,
        stream: bool = False,
        embedding: bool = False,
        change: Callable[[bytes], bytes] | None = None,
    ) -> web.StreamResponse:
        """Forward to an endpoint that only llama-server has; ``change`` is applied to its response."""
        warnings = llama_warnings(body, parsed)
        call = Call(path, engine_body(body))
        calls = calls_for(listed.model, llama=lambda: call, ollama=None, operation=path)
        return await self._respond(
            request,
            body,
            parsed,
            listed,
            lambda: (calls, Prepared()),
            lambda _: PassThroughEncoder(change),
            stream=stream,
            embedding=embedding,
            warnings=warnings,
        )
