"""The stand-in's server. What it does is what Ollama's API documentation says, nothing cleverer."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
import re
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from aiohttp import ClientSession, web

_GO = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass
class Known:
    """A model that the stand-in has."""

    name: str
    size: int = 1_000_000
    capabilities: tuple[str, ...] = ("completion", "tools")
    family: str = "llama"
    parameter_size: str = "8.0B"
    quantization: str = "Q4_K_M"
    remote_host: str = ""
    text: str = "Hello from the stand-in. I count: one two three four five six seven eight nine ten."

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.name.encode()).hexdigest()


@dataclass
class _Loaded:
    model: Known
    context: int
    expires: float
    using: int = 0
    turn: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))


class Standin:
    """One server. ``requests`` lists what was asked: (path, body)."""

    def __init__(
        self,
        models: Iterable[Known],
        *,
        speed: float = 1000.0,
        load_seconds: float = 0.0,
        parallel: int = 1,
        engine: str = "",
        version: str = "0.33.0",
    ) -> None:
        """``speed``: tokens per second of one request. ``engine``: URL of a llama-server for the text."""
        self.models = {model.name: model for model in models}
        self.speed = speed
        self.load_seconds = load_seconds
        self.parallel = parallel
        self.engine = engine
        self.version = version
        self.loaded: dict[str, _Loaded] = {}
        self.loads = 0
        self.awake = asyncio.Event()
        """Cleared: it takes connections and never answers."""
        self.awake.set()
        self.ps_free = asyncio.Event()
        """Cleared: ``/api/ps`` does not answer, as during some loads."""
        self.ps_free.set()
        self.breaks_off = False
        """Set: a connection is cut after the first line of a push or a creation."""
        self.blobs: dict[str, bytes] = {}
        self.polls = 0
        """Times that ``/api/ps`` was asked for."""
        self.refuses_pulls = False
        """Set: no model can be pulled."""
        self.requests: list[tuple[str, dict[str, Any]]] = []
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
                web.get("/api/ps", self._ps),
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
                web.post("/v1/chat/completions", self._v1_chat),
                web.post("/v1/completions", self._v1_chat),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.5)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port)
        await site.start()
        actual = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        self.url = f"http://{host}:{actual}"
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
        return await handler(request)

    # Small answers

    async def _root(self, request: web.Request) -> web.Response:
        return web.Response(text="Ollama is running")

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": self.version})

    def _details(self, model: Known) -> dict[str, Any]:
        return {
            "parent_model": "",
            "format": "gguf",
            "family": model.family,
            "families": [model.family],
            "parameter_size": model.parameter_size,
            "quantization_level": model.quantization,
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
                "capabilities": list(model.capabilities),
            }
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
                        "name": name,
                        "model": name,
                        "size": one.model.size,
                        "digest": one.model.digest,
                        "details": self._details(one.model),
                        "expires_at": datetime.fromtimestamp(min(one.expires, 4e9), tz=UTC).isoformat(),
                        "size_vram": 0,
                        "context_length": one.context,
                    }
                    for name, one in self.loaded.items()
                ]
            }
        )

    async def _show(self, request: web.Request) -> web.Response:
        body = await _json(request)
        model = self._known(body)
        return web.json_response(
            {
                "license": "",
                "modelfile": f"FROM {model.name}",
                "parameters": "",
                "template": "{{ .Prompt }}",
                "details": self._details(model),
                "model_info": {"general.architecture": model.family},
                "capabilities": list(model.capabilities),
                "modified_at": "2026-08-01T10:00:00Z",
            }
        )

    async def _copy(self, request: web.Request) -> web.Response:
        body = await _json(request)
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
        self.blobs[digest] = raw
        return web.Response(status=201)

    async def _blob_there(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if request.match_info["digest"] in self.blobs else 404)

    async def _create(self, request: web.Request) -> web.StreamResponse:
        body = await _json(request)
        if body.get("from"):
            self._known({"model": body["from"]})
        for digest in (body.get("files") or {}).values():
            if digest not in self.blobs:
                return web.json_response({"error": f"blob {digest} not found"}, status=400)
        name = _full(body["model"])
        self.models[name] = Known(name)
        return await self._statuses(request, "creating new layer", "writing manifest", "success")

    async def _push(self, request: web.Request) -> web.StreamResponse:
        self._known(await _json(request))
        return await self._statuses(request, "retrieving manifest", "pushing manifest", "success")

    async def _statuses(self, request: web.Request, *statuses: str) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        for status in statuses:
            await response.write(_line({"status": status}))
            if self.breaks_off:
                assert request.transport is not None
                request.transport.abort()
        return response

    async def _pull(self, request: web.Request) -> web.StreamResponse:
        body = await _json(request)
        name = _full(body.get("model") or body.get("name") or "")
        self.requests.append(("/api/pull", body))
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        if name.startswith("missing") or self.refuses_pulls:
            await response.write(b'{"error":"pull model manifest: file does not exist"}\n')
            return response
        model = Known(name)
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
        return await self._run(request, "/api/generate", body, empty=not body.get("prompt"))

    async def _run(
        self, request: web.Request, path: str, body: dict[str, Any], *, empty: bool
    ) -> web.StreamResponse:
        self.requests.append((path, body))
        model = self._known(body)
        keep = _seconds(body.get("keep_alive"))
        chat = path == "/api/chat"
        if empty and keep == 0:
            self.loaded.pop(model.name, None)
            return web.json_response(_final(model, chat, "unload"))
        begun = time.monotonic_ns()
        loaded = await self._load(model, int((body.get("options") or {}).get("num_ctx") or 4096))
        load_ns = time.monotonic_ns() - begun
        if empty:
            self._put_off(loaded, keep)
            return web.json_response(_final(model, chat, "load"))
        streamed = body.get("stream", True)
        count = 0
        words: list[str] = []
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        async with self._working(loaded, keep):
            started = time.monotonic_ns()
            async for word in self._words(model, body):
                count += 1
                words.append(word)
                if streamed:
                    if not response.prepared:
                        await response.prepare(request)
                    await response.write(_line(_delta(model, chat, word)))
            taken = time.monotonic_ns() - started
        final = _final(model, chat, "stop") | {
            "total_duration": time.monotonic_ns() - begun,
            "load_duration": load_ns,
            "prompt_eval_count": 7,
            "prompt_eval_duration": 1000,
            "eval_count": count,
            "eval_duration": max(1, taken),
        }
        if not streamed:
            return web.json_response(final | _delta(model, chat, "".join(words)) | {"done": True})
        if not response.prepared:
            await response.prepare(request)
        await response.write(_line(final))
        return response

    async def _v1_models(self, request: web.Request) -> web.Response:
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "library"} for name in self.models]
        return web.json_response({"object": "list", "data": data})

    async def _v1_chat(self, request: web.Request) -> web.StreamResponse:
        body = await _json(request)
        self.requests.append((request.path, body))
        model = self._known(body, v1=True)
        loaded = await self._load(model, 4096)
        chat = "chat" in request.path
        words: list[str] = []
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        async with self._working(loaded, None):
            async for word in self._words(model, body):
                words.append(word)
                if body.get("stream"):
                    if not response.prepared:
                        await response.prepare(request)
                    piece = {"delta": {"role": "assistant", "content": word}} if chat else {"text": word}
                    await response.write(_event(model, {"index": 0, "finish_reason": None} | piece, chat))
        usage = {"prompt_tokens": 7, "completion_tokens": len(words), "total_tokens": 7 + len(words)}
        if not body.get("stream"):
            text = "".join(words)
            choice = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            return web.json_response(
                _v1(model, [{"index": 0, "finish_reason": "stop"} | choice], chat) | {"usage": usage}
            )
        last = {"delta": {}} if chat else {"text": ""}
        await response.write(_event(model, {"index": 0, "finish_reason": "stop"} | last, chat))
        if (body.get("stream_options") or {}).get("include_usage"):
            raw = _packed(_v1(model, [], chat, chunk=True) | {"usage": usage})
            await response.write(f"data: {raw}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _embed(self, request: web.Request) -> web.Response:
        body = await _json(request)
        self.requests.append(("/api/embed", body))
        model = self._known(body)
        loaded = await self._load(model, 4096)
        texts = body.get("input", "")
        texts = [texts] if isinstance(texts, str) else texts
        async with self._working(loaded, _seconds(body.get("keep_alive"))):
            vectors = [_vector(text) for text in texts]
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
        return web.json_response({"embedding": [3 * x for x in _vector(body.get("prompt", ""))]})

    # The scheduler

    def _known(self, body: dict[str, Any], *, v1: bool = False) -> Known:
        asked = str(body.get("model") or body.get("name") or "")
        model = self.models.get(_full(asked))
        if model is None:
            model = next(
                (one for name, one in self.models.items() if name.lower() == _full(asked).lower()), None
            )
        if model is None:
            message = f"model '{asked}' not found"
            error: Any = {"message": message, "type": "not_found_error"} if v1 else message
            raise web.HTTPNotFound(text=json.dumps({"error": error}), content_type="application/json")
        return model

    async def _load(self, model: Known, context: int) -> _Loaded:
        self._expire()
        async with self._loading:
            loaded = self.loaded.get(model.name)
            if loaded is None or loaded.context != context:
                self.loads += 1
                await asyncio.sleep(self.load_seconds)
                loaded = _Loaded(model, context, time.time() + 300.0)
                loaded.turn = asyncio.Semaphore(self.parallel)
                self.loaded[model.name] = loaded
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
        self.loaded = {name: one for name, one in self.loaded.items() if one.using or one.expires > now}

    async def _words(self, model: Known, body: dict[str, Any]) -> AsyncIterator[str]:
        limit = (body.get("options") or {}).get("num_predict") or body.get("max_tokens") or 1 << 30
        if self.engine:
            async for word in self._engine_words(body, limit):
                yield word
            return
        due = time.monotonic()
        for count, word in enumerate(re.findall(r"\S+\s*", model.text)):
            if count >= limit:
                return
            # By the clock, so that a busy machine does not make it slower than it says.
            due += 1.0 / self.speed
            await asyncio.sleep(due - time.monotonic())
            yield word

    async def _engine_words(self, body: dict[str, Any], limit: int) -> AsyncIterator[str]:
        messages = body.get("messages") or [{"role": "user", "content": body.get("prompt", "")}]
        ask = {"messages": messages, "stream": True, "temperature": 0}
        if limit < 1 << 30:
            ask["max_tokens"] = limit
        async with ClientSession() as session:
            async with session.post(f"{self.engine}/v1/chat/completions", json=ask) as answer:
                async for raw in answer.content:
                    if raw.startswith(b"data: {"):
                        choices = json.loads(raw[6:]).get("choices") or [{}]
                        if word := (choices[0].get("delta") or {}).get("content"):
                            yield word


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
    """Ollama's keep_alive: a number of seconds or a Go duration."""
    if value is None:
        return None
    if isinstance(value, (int, float)):
        return float(value)
    text = str(value)
    try:
        return float(text)
    except ValueError:
        parts = re.findall(r"([\d.]+)(ns|us|ms|s|m|h)", text)
        total = sum(float(number) * _GO[unit] for number, unit in parts)
        return -total if text.startswith("-") else total


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _delta(model: Known, chat: bool, word: str) -> dict[str, Any]:
    text = {"message": {"role": "assistant", "content": word}} if chat else {"response": word}
    return {"model": model.name, "created_at": _now(), **text, "done": False}


def _final(model: Known, chat: bool, reason: str) -> dict[str, Any]:
    return _delta(model, chat, "") | {"done": True, "done_reason": reason}


def _line(value: dict[str, Any]) -> bytes:
    return _packed(value).encode() + b"\n"


def _packed(value: dict[str, Any]) -> str:
    """Without spaces, as Go writes it."""
    return json.dumps(value, separators=(",", ":"))


def _v1(model: Known, choices: list[dict[str, Any]], chat: bool, *, chunk: bool = False) -> dict[str, Any]:
    kind = ("chat.completion.chunk" if chunk else "chat.completion") if chat else "text_completion"
    return {"id": "chatcmpl-1", "object": kind, "created": 0, "model": model.name, "choices": choices}


def _event(model: Known, choice: dict[str, Any], chat: bool) -> bytes:
    return f"data: {_packed(_v1(model, [choice], chat, chunk=True))}\n\n".encode()


def _vector(text: str) -> list[float]:
    raw = hashlib.sha256(text.encode()).digest()[:8]
    norm = math.sqrt(sum(x * x for x in raw)) or 1.0
    return [x / norm for x in raw]
