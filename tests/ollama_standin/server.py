"""The server of the Ollama double. It follows Ollama's API documentation."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from aiohttp import web

from tests.ollama_standin import context, engine, records, refusals
from tests.ollama_standin.engine import EngineError, Piece, normalized
from tests.ollama_standin.newer import Form, Messages, Responses

_ALIKE = 30
"""Repetitions of one token that end an answer."""
_NAME = re.compile(
    r"([A-Za-z0-9_.\-]+(:\d+)?/)?([A-Za-z0-9_.\-]+/)?[A-Za-z0-9_][A-Za-z0-9_.\-]*(:[A-Za-z0-9_.\-]+)?"
)
_V1_PARAMS = ("temperature", "top_p", "stop", "seed", "frequency_penalty", "presence_penalty")
_GO = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass
class Known:
    """A model of the double."""

    name: str
    size: int = 1_000_000
    capabilities: tuple[str, ...] = ("completion", "tools")
    listed: tuple[str, ...] | None = None
    """The capabilities in ``/api/tags``, if they are fewer."""
    family: str = "llama"
    parameter_size: str = "8.0B"
    quantization: str = "Q4_K_M"
    remote_host: str = ""
    text: str = "Hello from the stand-in. I count: one two three four five six seven eight nine ten."
    context: int = 4096
    engine: str = ""
    """URL of a llama-server that answers instead of `text`."""
    blob: str = ""
    """Id of the weights. Names with the same weights share a runner. Empty: weights of its own."""
    template: str = ""
    system: str = ""
    params: dict[str, Any] = field(default_factory=dict)
    messages: tuple[tuple[str, str], ...] = ()
    """MESSAGE layers as (role, content)."""
    parent: str = ""

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.name.encode()).hexdigest()

    @property
    def weights(self) -> str:
        return self.blob or self.name

    def with_layers(self, body: dict[str, Any], *, chat: bool) -> dict[str, Any]:
        """Return the request with the additions of this model's layers."""
        body = dict(body)
        body["options"] = {**self.params, **(body.get("options") or {})}
        layer_messages = [{"role": role, "content": content} for role, content in self.messages]
        if chat:
            given = body.get("messages") or []
            first = given[0].get("role") if given else ""
            system = [{"role": "system", "content": self.system}] if self.system and first != "system" else []
            body["messages"] = [*system, *layer_messages, *given]
        elif not body.get("raw"):
            body["system"] = body.get("system") or self.system
            body["before"] = [] if body.get("context") else layer_messages
        if self.template and not body.get("raw"):
            body["template"] = body.get("template") or self.template
        return body


@dataclass
class _Loaded:
    model: Known
    context: int
    expires: float
    using: int = 0
    turn: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))


class Standin:
    """An Ollama server. ``requests`` lists its requests as (path, body)."""

    def __init__(
        self,
        models: Iterable[Known],
        *,
        speed: float = 1000.0,
        load_seconds: float = 0.0,
        parallel: int = 1,
        version: str = "0.33.0",
    ) -> None:
        """``speed``: tokens per second of one request without an engine."""
        self.models = {model.name: model for model in models}
        self.speed = speed
        self.load_seconds = load_seconds
        self.parallel = parallel
        self.version = version
        self.loaded: dict[str, _Loaded] = {}
        self.loads = 0
        self.awake = asyncio.Event()
        """Cleared: the server accepts connections and never answers."""
        self.awake.set()
        self.ps_free = asyncio.Event()
        """Cleared: ``/api/ps`` does not answer, as during some loads."""
        self.ps_free.set()
        self.breaks_off = False
        """Set: a connection is closed after the first line of a push or a creation."""
        self.blobs: dict[str, bytes] = {}
        self.polls = 0
        """Number of requests of ``/api/ps``."""
        self.refuses_pulls = False
        """Set: no model can be pulled."""
        self.on_pull: Callable[[str], object] = lambda name: None
        """Called with the name of a model before a pull of it succeeds."""
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.shown: list[str] = []
        """Models requested from ``/api/show``."""
        self.under_way = 0
        self.most_under_way = 0
        self.url = ""
        self._loading = asyncio.Lock()
        self._runner: web.AppRunner | None = None

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> str:
        app = web.Application(client_max_size=1 << 28, middlewares=[self._hang])
        app.add_routes(
            [
                web.get("/", self._root),
                web.get("/api/version", self._version),
                web.get("/api/tags", self._tags),
                web.get("/api/ps", self._ps, allow_head=False),
                web.post("/api/me", self._me),
                web.post("/api/signout", self._signout),
                web.post("/api/show", self._show),
                web.post("/api/chat", self._chat),
                web.post("/api/generate", self._generate),
                web.post("/api/embed", self._embed),
                web.post("/api/embeddings", self._embeddings),
                web.post("/api/pull", self._pull),
                web.post("/api/push", self._push),
                web.post("/api/create", self._create),
                web.post("/api/blobs/{digest}", self._blob),
                web.head("/api/blobs/{digest}", self._blob_there),
                web.post("/api/copy", self._copy),
                web.delete("/api/delete", self._delete),
                web.get("/v1/models", self._v1_models),
                web.get("/v1/models/{model:.+}", self._v1_model),
                web.post("/v1/chat/completions", self._v1_chat),
                web.post("/v1/completions", self._v1_chat),
                web.post("/v1/embeddings", self._v1_embeddings),
                web.post("/v1/messages", self._v1_messages),
                web.post("/v1/responses", self._v1_responses),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.5)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port)
        await site.start()
        self.url = f"http://{host}:{self._runner.addresses[0][1]}"
        return self.url

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def __aenter__(self) -> Standin:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @web.middleware
    async def _hang(self, request: web.Request, handler: Any) -> web.StreamResponse:
        await self.awake.wait()
        response: web.StreamResponse = await handler(request)
        return response

    # Small answers

    async def _root(self, request: web.Request) -> web.Response:
        return web.Response(text="Ollama is running")

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": self.version})

    def _details(self, model: Known) -> dict[str, Any]:
        return {
            "parent_model": model.parent,
            "format": "gguf",
            "family": model.family,
            "families": [model.family],
            "parameter_size": model.parameter_size,
            "quantization_level": model.quantization,
            "context_length": model.context,
            "embedding_length": 64,
        }

    async def _tags(self, request: web.Request) -> web.Response:
        models = []
        for model in self.models.values():
            listed = {
                "name": model.name,
                "model": model.name,
                "modified_at": "2026-08-01T10:00:00.123456789+02:00",
                "size": model.size,
                "digest": model.digest,
                "details": self._details(model),
                "capabilities": list(model.capabilities if model.listed is None else model.listed),
            }
            if model.listed == ():
                del listed["capabilities"]
            if model.remote_host:
                listed["remote_host"] = model.remote_host
            models.append(listed)
        return web.json_response({"models": models})

    async def _ps(self, request: web.Request) -> web.Response:
        self.polls += 1
        await self.ps_free.wait()
        self._expire()
        return web.json_response(
            {
                "models": [
                    {
                        # The name by which the runner was loaded, even if another name uses it.
                        "name": loaded.model.name,
                        "model": loaded.model.name,
                        "size": loaded.model.size,
                        "digest": loaded.model.digest,
                        "details": self._details(loaded.model),
                        "expires_at": datetime.fromtimestamp(min(loaded.expires, 4e9), tz=UTC).isoformat(),
                        "size_vram": 0,
                        "context_length": loaded.context,
                    }
                    for loaded in self.loaded.values()
                ]
            }
        )

    async def _show(self, request: web.Request) -> web.Response:
        body = await _json(request)
        self.shown.append(body.get("model", ""))
        model = self._known(body)
        return web.json_response(
            {
                "license": "",
                "modelfile": f"FROM {model.name}",
                "parameters": "\n".join(f"{key:<30} {value}" for key, value in model.params.items()),
                "template": model.template or "{{ .Prompt }}",
                "system": model.system,
                "details": self._details(model),
                "model_info": {"general.architecture": model.family},
                "capabilities": list(model.capabilities),
                "modified_at": "2026-08-01T10:00:00Z",
            }
        )

    async def _copy(self, request: web.Request) -> web.Response:
        body = await _json(request)
        _check_name(body.get("destination", ""))
        model = self._known({"model": body.get("source", "")})
        self.models[_full(body["destination"])] = Known(
            **{**model.__dict__, "name": _full(body["destination"])}
        )
        return web.Response()

    async def _delete(self, request: web.Request) -> web.Response:
        del self.models[self._known(await _json(request)).name]
        return web.Response()

    async def _blob(self, request: web.Request) -> web.Response:
        raw, digest = await request.read(), request.match_info["digest"]
        if digest != f"sha256:{hashlib.sha256(raw).hexdigest()}":
            return web.json_response({"error": "digest mismatch"}, status=400)
        known = digest in self.blobs
        self.blobs[digest] = raw
        return web.Response(status=200 if known else 201)

    async def _blob_there(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if request.match_info["digest"] in self.blobs else 404)

    async def _create(self, request: web.Request) -> web.StreamResponse:
        body = await _json(request)
        _check_name(body.get("model", ""))
        base = self._known({"model": body["from"]}) if body.get("from") else None
        for digest in (body.get("files") or {}).values():
            if digest not in self.blobs:
                return web.json_response({"error": f"blob {digest} not found"}, status=400)
        name = _full(body["model"])
        self.models[name] = replace(
            base or Known(name),
            name=name,
            blob=base.weights if base else "",
            template=body.get("template") or (base.template if base else ""),
            system=body.get("system") or (base.system if base else ""),
            params={**(base.params if base else {}), **(body.get("parameters") or {})},
            messages=tuple((message["role"], message["content"]) for message in body.get("messages") or ())
            or (base.messages if base else ()),
            parent=base.name if base else "",
        )
        return await self._statuses(request, body, "creating new layer", "writing manifest", "success")

    async def _push(self, request: web.Request) -> web.StreamResponse:
        body = await _json(request)
        self._known(body)
        return await self._statuses(request, body, "retrieving manifest", "pushing manifest", "success")

    async def _statuses(
        self, request: web.Request, body: dict[str, Any], *statuses: str
    ) -> web.StreamResponse:
        if body.get("stream") is False:
            return web.json_response({"status": statuses[-1]})
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        for status in statuses:
            await response.write(records.line({"status": status}))
            if self.breaks_off:
                assert request.transport is not None
                request.transport.abort()
        return response

    async def _pull(self, request: web.Request) -> web.StreamResponse:
        body = await _json(request)
        _check_name(body.get("model") or body.get("name") or "")
        name = _full(body.get("model") or body.get("name") or "")
        self.requests.append(("/api/pull", body))
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        if name.startswith("missing") or self.refuses_pulls:
            await response.write(b'{"error":"pull model manifest: file does not exist"}\n')
            return response
        model = Known(name)
        self.on_pull(name)
        lines: list[dict[str, Any]] = [{"status": "pulling manifest"}]
        digest = f"sha256:{model.digest}"
        part = {"status": f"pulling {model.digest[:12]}", "digest": digest, "total": model.size}
        lines.extend(part | {"completed": model.size * quarter // 4} for quarter in range(5))
        lines += [
            {"status": "verifying sha256 digest"},
            {"status": "writing manifest"},
            {"status": "success"},
        ]
        for line in lines:
            await response.write(json.dumps(line).encode() + b"\n")
        self.models[name] = model
        return response

    # Answers that take time

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await _json(request)
        return await self._run(request, "/api/chat", body, empty=not body.get("messages"))

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await _json(request)
        return await self._run(
            request, "/api/generate", body, empty=not body.get("prompt") and not body.get("images")
        )

    async def _run(
        self, request: web.Request, path: str, body: dict[str, Any], *, empty: bool
    ) -> web.StreamResponse:
        self.requests.append((path, body))
        chat = path == "/api/chat"
        if chat and not body.get("model"):
            raise _refused(400, "model is required")
        model = self._known(body)
        keep = _seconds(body.get("keep_alive"))
        if "completion" not in model.capabilities and not empty:
            raise _refused(400, f'"{body["model"]}" does not support {"chat" if chat else "generate"}')
        if empty and keep == 0:
            self.loaded.pop(model.weights, None)
            return web.json_response(records.final(model.name, chat, "unload"))
        if refused := refusals.check_inference(body, sees="vision" in model.capabilities):
            raise _refused(*refused)
        if body.get("think") and "thinking" not in model.capabilities:
            raise _refused(400, f'"{body["model"]}" does not support thinking')
        if body.get("tools") and "tools" not in model.capabilities:
            raise _refused(400, f"registry.ollama.ai/library/{model.name} does not support tools")
        if body.get("suffix") and "insert" not in model.capabilities:
            raise _refused(400, f"registry.ollama.ai/library/{model.name} does not support insert")
        if wrong := context.option_error(body.get("options") or {}):
            raise _refused(500, wrong)
        if _texts_for_arguments(body):
            raise _refused(400, "json: cannot unmarshal string into Go struct field .arguments")
        begun = time.monotonic_ns()
        loaded = await self._load(model, context.requested_context(model.params, body))
        load_ns = time.monotonic_ns() - begun
        if empty:
            self._put_off(loaded, keep)
            return web.json_response(records.final(model.name, chat, "load"))
        streamed = body.get("stream", True)
        body = context.fitted(model.with_layers(body, chat=chat), loaded.context)
        whole = Piece()
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        async with self._working(loaded, keep):
            started = time.monotonic_ns()
            try:
                async for piece in self._pieces(model, body, chat):
                    records.add(whole, piece)
                    if streamed and not piece.reason:
                        if not response.prepared:
                            await response.prepare(request)
                        await response.write(records.line(records.delta(model.name, chat, piece)))
            except EngineError as error:
                raise _refused(error.status, str(error)) from None
            taken = time.monotonic_ns() - started
        if not whole.reason:
            # The answer was ended as a loop: the body ends without a final record.
            if not streamed:
                return web.json_response(records.delta(model.name, chat, whole))
            return response
        final = records.final(model.name, chat, whole.reason) | {
            "total_duration": time.monotonic_ns() - begun,
            "load_duration": load_ns,
            "prompt_eval_count": whole.prompt,
            "prompt_eval_duration": 1000,
            "eval_count": whole.count,
            "eval_duration": max(1, taken),
        }
        if whole.context is not None:
            final["context"] = whole.context
        if not streamed:
            return web.json_response(final | records.delta(model.name, chat, whole) | {"done": True})
        if not response.prepared:
            await response.prepare(request)
        await response.write(records.line(final))
        return response

    async def _v1_models(self, request: web.Request) -> web.Response:
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "library"} for name in self.models]
        return _v1_json({"object": "list", "data": data})

    async def _v1_model(self, request: web.Request) -> web.Response:
        name = request.match_info["model"]
        self._known({"model": name}, v1=True)
        return _v1_json({"id": name, "object": "model", "created": 0, "owned_by": "library"})

    async def _me(self, request: web.Request) -> web.Response:
        return web.json_response({"error": "unauthorized"}, status=401)

    async def _signout(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _v1_chat(self, request: web.Request) -> web.StreamResponse:
        body = await _json(request)
        self.requests.append((request.path, body))
        model = self._known(body, v1=True)
        loaded = await self._load(model, context.requested_context(model.params, {}))
        chat = "chat" in request.path
        effort = body.get("reasoning_effort")
        if chat and not body.get("messages"):
            raise _refused(400, "[] is too short - 'messages'", v1=True)
        if not chat and not isinstance(body.get("prompt") or "", str):
            raise _refused(400, "json: cannot unmarshal array into Go struct field .prompt", v1=True)
        if body.get("tools") and "tools" not in model.capabilities:
            raise _refused(400, f"registry.ollama.ai/library/{model.name} does not support tools", v1=True)
        if refused := refusals.check_tools(body.get("tools")):
            raise _refused(*refused, v1=True)
        if effort is not None and effort not in refusals.EFFORTS:
            raise _refused(400, f'invalid reasoning value: "{effort}"', v1=True)
        if effort not in (None, "none") and "thinking" not in model.capabilities:
            raise _refused(400, f'"{body["model"]}" does not support thinking', v1=True)
        if chat:
            body = self._v1_conversation(model, body, loaded)
        whole = Piece()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        async with self._working(loaded, None):
            try:
                async for piece in self._pieces(model, body, chat, v1=True):
                    records.add(whole, piece)
                    if body.get("stream") and not piece.reason:
                        if not response.prepared:
                            await response.prepare(request)
                        shown = {"delta": records.v1_message(piece)} if chat else {"text": piece.text}
                        shown |= records.v1_logprobs(piece)
                        await response.write(
                            records.event(model.name, {"index": 0, "finish_reason": None} | shown, chat)
                        )
            except EngineError as error:
                raise _refused(error.status, str(error), v1=True) from None
        if not whole.reason and body.get("stream"):
            return response
        reason = "tool_calls" if whole.calls else whole.reason
        usage = {
            "prompt_tokens": whole.prompt,
            "completion_tokens": whole.count,
            "total_tokens": whole.prompt + whole.count,
        }
        if not body.get("stream"):
            choice = {"message": records.v1_message(whole)} if chat else {"text": whole.text}
            choice |= records.v1_logprobs(whole)
            return _v1_json(
                records.v1(model.name, [{"index": 0, "finish_reason": reason} | choice], chat)
                | {"usage": usage}
            )
        if not response.prepared:
            await response.prepare(request)
        last: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
        await response.write(records.event(model.name, {"index": 0, "finish_reason": reason} | last, chat))
        if (body.get("stream_options") or {}).get("include_usage"):
            raw = records.packed(records.v1(model.name, [], chat, chunk=True) | {"usage": usage})
            await response.write(f"data: {raw}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response

    def _v1_conversation(self, model: Known, body: dict[str, Any], loaded: _Loaded) -> dict[str, Any]:
        """Return ``body`` with the model's layers, truncated to the context."""
        body = context.fitted(model.with_layers(body, chat=True), loaded.context)
        named = body.pop("options")
        return {**{key: value for key, value in named.items() if key in _V1_PARAMS}, **body}

    async def _v1_messages(self, request: web.Request) -> web.StreamResponse:
        return await self._newer(request, Messages())

    async def _v1_responses(self, request: web.Request) -> web.StreamResponse:
        return await self._newer(request, Responses())

    async def _newer(self, request: web.Request, form: Form) -> web.StreamResponse:
        body = await _json(request)
        self.requests.append((request.path, body))
        model = self._known(body, v1=True)
        if body.get("tools") and "tools" not in model.capabilities:
            raise _refused(400, f"{model.name} does not support tools", v1=True)
        loaded = await self._load(model, context.requested_context(model.params, {}))
        conversation = self._v1_conversation(model, form.conversation(body), loaded)
        whole = Piece()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        async with self._working(loaded, None):
            try:
                async for piece in self._pieces(model, conversation, True, v1=True):
                    records.add(whole, piece)
                    if body.get("stream") and piece.text:
                        if not response.prepared:
                            await response.prepare(request)
                            await response.write(b"".join(form.begin(model.name)))
                        await response.write(b"".join(form.delta(piece.text)))
            except EngineError as error:
                raise _refused(error.status, str(error), v1=True) from None
        if not body.get("stream"):
            return _v1_json(form.whole(model.name, whole))
        if not response.prepared:
            await response.prepare(request)
            await response.write(b"".join(form.begin(model.name)))
        await response.write(b"".join(form.end(model.name, whole)))
        return response

    async def _v1_embeddings(self, request: web.Request) -> web.Response:
        body = await _json(request)
        self.requests.append(("/v1/embeddings", body))
        model = self._known(body, v1=True)
        await self._load(model, 4096)
        given = body.get("input")
        if not given and given != "":
            raise _refused(400, "invalid input", v1=True)
        if refused := refusals.check_embedding([given] if isinstance(given, str) else given):
            raise _refused(*refused, v1=True)
        texts = [given] if isinstance(given, str) else given
        vectors = [normalized(vector, body.get("dimensions")) for vector in await self._vectors(model, texts)]
        data = [
            {"object": "embedding", "embedding": vector, "index": index}
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": 2 * len(texts), "total_tokens": 2 * len(texts)}
        return _v1_json({"object": "list", "data": data, "model": model.name, "usage": usage})

    async def _embed(self, request: web.Request) -> web.Response:
        body = await _json(request)
        self.requests.append(("/api/embed", body))
        model = self._known(body, pulling=True)
        loaded = await self._load(model, 4096)
        if refused := refusals.check_embedding(body.get("input")):
            raise _refused(*refused)
        texts = body.get("input") or []
        texts = [texts] if isinstance(texts, str) else texts
        async with self._working(loaded, _seconds(body.get("keep_alive"))):
            found = await self._vectors(model, texts, truncate=body.get("truncate") is not False)
            vectors = [normalized(vector, body.get("dimensions")) for vector in found]
        return web.json_response(
            {
                "model": model.name,
                "embeddings": vectors,
                "total_duration": 1000,
                "load_duration": 1,
                "prompt_eval_count": 2 * len(texts),
            }
        )

    async def _embeddings(self, request: web.Request) -> web.Response:
        body = await _json(request)
        self.requests.append(("/api/embeddings", body))
        model = self._known(body)
        await self._load(model, 4096)
        (vector,) = await self._vectors(model, [body.get("prompt", "")])
        return web.json_response({"embedding": [3 * x for x in vector]})

    async def _vectors(self, model: Known, texts: list[str], *, truncate: bool = True) -> list[list[float]]:
        if not model.engine:
            return [_vector(text) for text in texts]
        try:
            return await engine.embed(model.engine, texts, model.context - 2, truncate=truncate)
        except EngineError as error:
            raise _refused(error.status, str(error)) from None

    # The scheduler

    def _known(self, body: dict[str, Any], *, v1: bool = False, pulling: bool = False) -> Known:
        wanted = str(body.get("model") or body.get("name") or "")
        model = self.models.get(_full(wanted))
        if model is None:
            model = next(
                (known for name, known in self.models.items() if name.lower() == _full(wanted).lower()), None
            )
        if model is None:
            message = f"model '{wanted}' not found"
            if pulling:
                message = f'model "{wanted}" not found, try pulling it first'
            error: Any = {"message": message, "type": "not_found_error"} if v1 else message
            raise web.HTTPNotFound(text=json.dumps({"error": error}), content_type="application/json")
        return model

    async def _load(self, model: Known, size: int) -> _Loaded:
        self._expire()
        async with self._loading:
            loaded = self.loaded.get(model.weights)
            if loaded is None or loaded.context != size:
                self.loads += 1
                await asyncio.sleep(self.load_seconds)
                loaded = _Loaded(model, size, time.time() + 300.0)
                loaded.turn = asyncio.Semaphore(self.parallel)
                self.loaded[model.weights] = loaded
        return loaded

    @contextlib.asynccontextmanager
    async def _working(self, loaded: _Loaded, keep: float | None) -> AsyncIterator[None]:
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        loaded.using += 1
        try:
            async with loaded.turn:
                yield
        finally:
            self.under_way -= 1
            loaded.using -= 1
            self._put_off(loaded, keep)

    def _put_off(self, loaded: _Loaded, keep: float | None) -> None:
        seconds = 300.0 if keep is None else keep
        loaded.expires = time.time() + (seconds if seconds >= 0 else 1e9)

    def _expire(self) -> None:
        now = time.time()
        self.loaded = {
            name: loaded for name, loaded in self.loaded.items() if loaded.using or loaded.expires > now
        }

    async def _pieces(
        self, model: Known, body: dict[str, Any], chat: bool, *, v1: bool = False
    ) -> AsyncIterator[Piece]:
        if not model.engine:
            count, alike, last = 0, 0, ""
            async for word in self._words(model, body):
                count += 1
                alike = alike + 1 if word.strip() == last else 0
                last = word.strip()
                if alike >= _ALIKE:
                    return
                yield Piece(word)
            yield Piece(reason="stop", prompt=7 + _history_words(body), count=count)
            return
        if v1 and not chat:
            # This route fills in the model's template, as /api/generate does.
            body = {**body, "options": body | {"num_predict": body.get("max_tokens", -1)}}
        if not chat:
            answer = engine.generate(model.engine, body)
        else:
            answer = (engine.v1_chat if v1 else engine.chat)(model.engine, body)
        async with contextlib.aclosing(answer) as pieces:
            async for piece in pieces:
                yield piece

    async def _words(self, model: Known, body: dict[str, Any]) -> AsyncIterator[str]:
        limit = (body.get("options") or {}).get("num_predict") or body.get("max_tokens") or 0
        limit = limit if limit > 0 else 1 << 30
        due = time.monotonic()
        for count, word in enumerate(re.findall(r"\S+\s*", model.text)):
            if count >= limit:
                return
            # Paced by the clock, so that a busy machine does not lower the speed.
            due += 1.0 / self.speed
            await asyncio.sleep(due - time.monotonic())
            yield word


def _texts_for_arguments(body: dict[str, Any]) -> bool:
    """Return whether a tool call in the history has its arguments as a string, as in OpenAI's format."""
    calls = [call for message in body.get("messages", ()) for call in message.get("tool_calls") or ()]
    return any(isinstance(call["function"].get("arguments"), str) for call in calls)


def _history_words(body: dict[str, Any]) -> int:
    """Count the words of the messages before the last and of those added by the model's layers."""
    texts = [message.get("content") or "" for message in (body.get("messages") or [])[:-1]]
    texts += [message["content"] for message in body.get("before") or ()]
    return sum(len(text.split()) for text in texts)


def _v1_json(value: dict[str, Any]) -> web.Response:
    return web.Response(text=json.dumps(value), content_type="application/json", charset="utf-8")


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _refused(400, "invalid model name")


def _refused(status: int, message: str, *, v1: bool = False) -> web.HTTPException:
    kind = "invalid_request_error" if status == 400 else "api_error"
    error: Any = {"message": message, "type": kind, "param": None, "code": None} if v1 else message
    kinds = {400: web.HTTPBadRequest, 404: web.HTTPNotFound}
    return kinds.get(status, web.HTTPInternalServerError)(
        text=json.dumps({"error": error}), content_type="application/json"
    )


async def _json(request: web.Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.read() or b"null")
    except ValueError as error:
        raise web.HTTPBadRequest(
            text=json.dumps({"error": str(error)}), content_type="application/json"
        ) from None
    if not isinstance(body, dict):
        raise web.HTTPBadRequest(text='{"error":"missing request body"}', content_type="application/json")
    return body


def _full(name: str) -> str:
    return name if ":" in name.rsplit("/", 1)[-1] else f"{name}:latest"


def _seconds(value: object) -> float | None:
    """Return keep_alive in seconds: a number or a Go duration."""
    if value is None:
        return None
    if isinstance(value, (int, float)):
        return float(value)
    text = str(value)
    if not re.fullmatch(r"[-+]?(0|([\d.]+(ns|us|ms|s|m|h))+)", text):
        raise _refused(400, f'time: invalid duration "{text}"')
    parts = re.findall(r"([\d.]+)(ns|us|ms|s|m|h)", text)
    total = sum(float(number) * _GO[unit] for number, unit in parts)
    return -total if text.startswith("-") else total


def _vector(text: str) -> list[float]:
    raw = hashlib.sha256(text.encode()).digest()[:8]
    norm = math.sqrt(sum(x * x for x in raw)) or 1.0
    return [x / norm for x in raw]
