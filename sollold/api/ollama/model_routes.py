"""Ollama's dialect: the endpoints that list, show, download, create, copy and delete models."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
from aiohttp import web

from sollold.api.engine.fields import require_model
from sollold.api.http.body import accept_body, as_type, read_bytes, read_object
from sollold.api.http.errors import Dialect, refusal_bytes, refusal_object, status_of
from sollold.api.http.exchange import exchange_of
from sollold.api.http.response import JSON, NDJSON, json_response
from sollold.api.http.route import Route
from sollold.api.http.services import AppServices
from sollold.api.ollama.create import Create, name_overrides
from sollold.api.ollama.modelfile_text import modelfile_fields
from sollold.api.ollama.models import ps, show, tags, with_settings
from sollold.api.ollama.request import Copy, Delete, Named, Relayable, fold_keys, read_as
from sollold.errors import Fault, Refusal, bad_request
from sollold.models.listing import Listed
from sollold.models.names import parse
from sollold.undecodable import UNDECODABLE

log = logging.getLogger("sollold.api")

_SHOW_SECONDS = 10.0

_NOT_AT_OLLAMA = (
    "only an Ollama can do this, and none has {name}: create it there first, with the path of its file as "
    "FROM in a Modelfile (ollama create)"
)
_NO_RELAY = (
    "{what} needs an Ollama, and no node of this cluster has a reachable one; start Ollama on a node, or "
    "put the GGUF file into a model folder (sollold.toml, [models] folders)"
)


class OllamaModelRoutes:
    """The handlers of Ollama's dialect for models."""

    def __init__(self, services: AppServices) -> None:
        self._services = services
        self._verbose = asyncio.Lock()
        """Limits verbose answers, each with a whole vocabulary, to one at a time."""

    def routes(self) -> list[Route]:
        """Return the route table."""
        lines = partial(Route, produces=("application/json", "application/x-ndjson"))
        return [
            Route("POST", "/api/show", self._show, "Details of a model", Named),
            lines("POST", "/api/pull", self._pull, "Download a model", Named),
            lines("POST", "/api/push", self._relay, "Push a model through an Ollama", Relayable),
            lines("POST", "/api/create", self._create, "Create a model, or a second name", Create),
            Route("POST", "/api/copy", self._copy, "Give a model a second name", Copy, produces=()),
            Route("DELETE", "/api/delete", self._delete, "Remove a downloaded model", Delete, produces=()),
            Route("POST", "/api/blobs/{digest}", self._relay, "Upload a blob to an Ollama", statuses=(201,)),
            Route("HEAD", "/api/blobs/{digest}", self._relay, "Whether an Ollama has a blob"),
            Route("GET", "/api/tags", self._tags, "The models of the whole cluster"),
            Route("GET", "/api/ps", self._ps, "The models that are loaded"),
        ]

    async def _tags(self, request: web.Request) -> web.Response:
        """``/api/tags``; with ``?unusable=true`` including the models that can't be run."""
        unusable = request.query.get("unusable", "").lower() in ("1", "true", "yes")
        return json_response(
            tags(await self._services.library.models(), self._services.library.node_names, unusable=unusable)
        )

    async def _ps(self, request: web.Request) -> web.Response:
        library = self._services.library
        return json_response(ps(library.running(), await library.models(), time.time()))

    async def _show(self, request: web.Request) -> web.Response:
        _, parsed = await read_as(request, Named)
        listed = await self._services.library.find(parsed.wanted)
        # `ollama run` sends a conversation's settings, and shows the model with them applied.
        listed = replace(listed, model=with_settings(listed.model, parsed.system, parsed.options))
        if not listed.model.files and (shown := await self._ask_ollama(listed, parsed)) is not None:
            return json_response({**shown, "nodes": self._services.library.node_names(listed)})
        library = self._services.library
        if not parsed.verbose:
            return json_response(
                show(listed, library.node_names, await library.metadata(listed), verbose=False)
            )
        # A vocabulary of 256,000 tokens takes some ten MB, and some ten milliseconds to encode.
        async with self._verbose:
            metadata = await library.metadata(listed, whole=True)
            shown = show(listed, library.node_names, metadata, verbose=True)
            body = await asyncio.to_thread(msgspec.json.encode, shown)
        return web.Response(body=body, headers={"Content-Type": JSON})

    async def _ask_ollama(self, listed: Listed, parsed: Named) -> dict[str, Any] | None:
        """Return the answer of the Ollama that has the model, which alone has its files; None on failure."""
        relay = self._services.relay
        if relay is None:
            return None
        settings = {"system": parsed.system, "options": parsed.options}
        body = msgspec.json.encode(
            {
                "model": listed.model.name,
                "verbose": bool(parsed.verbose),
                **{key: value for key, value in settings.items() if value},
            }
        )
        try:
            async with asyncio.timeout(_SHOW_SECONDS):
                answer = await relay.forward("POST", "/api/show", body, listed.model.name)
                if answer is None:
                    return None
                try:
                    raw = b"".join([piece async for piece in answer.chunks()])
                finally:
                    await answer.close()
            return msgspec.json.decode(raw, type=dict[str, Any]) if answer.status == 200 else None
        except (Refusal, TimeoutError, *UNDECODABLE) as error:
            log.info("the Ollama that has %s does not describe it: %s", listed.model.name, error)
            return None

    async def _pull(self, request: web.Request) -> web.StreamResponse:
        _, parsed = await read_as(request, Named)
        name = parsed.wanted
        try:
            parse(name)
        except ValueError as error:
            raise bad_request(str(error)) from None
        puller = self._services.puller
        if puller is None:
            raise bad_request("this node can't download models", status=501)
        steps = puller.pull(name, insecure=bool(parsed.insecure))
        if parsed.stream is False:
            last: dict[str, Any] = {}
            async with contextlib.aclosing(steps) as rest:
                async for step in rest:
                    last = step
            return json_response(last)
        return await self._steps(request, steps)

    async def _steps(
        self, request: web.Request, steps: AsyncGenerator[dict[str, Any], None]
    ) -> web.StreamResponse:
        """Stream progress as lines. A refusal before the first line sets the status, a later one ``code``."""
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
                exchange_of(request).refused = refusal.message
                record = {**refusal_object(Dialect.OLLAMA, refusal), "code": status_of(refusal)}
                await response.write(msgspec.json.encode(record) + b"\n")
            except (ConnectionError, GeneratorExit):
                raise
            except Exception:
                log.exception("downloading a model failed")
                failed = Refusal(Fault.INTERRUPTED, "download failed: internal error; see the node's log")
                await response.write(refusal_bytes(Dialect.OLLAMA, failed) + b"\n")
        await response.write_eof()
        return response

    async def _relay(self, request: web.Request, changed: dict[str, Any] | None = None) -> web.StreamResponse:
        """Push, create and blobs: forward the request to an Ollama, with its own body or ``changed``."""
        relay = self._services.relay
        path = request.path if request.path.startswith("/api/") else request.path.removeprefix("/v1")
        if path.startswith("/api/blobs/") and not _is_digest(request.match_info["digest"]):
            raise bad_request("a blob's name must be sha256: and 64 hex digits")
        body: AsyncIterator[bytes] | bytes = request.content.iter_any()
        model = ""
        if not path.startswith("/api/blobs/"):
            _, parsed = await read_as(request, Relayable)
            body, model = bytes(await read_bytes(request)), parsed.needed(path)
            if changed is not None:
                body, model = msgspec.json.encode(changed), str(changed["from"])
        elif relay is not None:
            accept_body(request, exchange_of(request))
        answer = await relay.forward(request.method, path, body, model) if relay is not None else None
        if answer is None:
            raise bad_request(_NO_RELAY.format(what=path), status=501)
        try:
            if answer.status == 404 and model:
                await self._check_unknown(model)
            response = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.kind or JSON})
            await response.prepare(request)
            try:
                async with contextlib.aclosing(answer.chunks()) as pieces:
                    async for piece in pieces:
                        await response.write(piece)
            except Refusal as refusal:
                exchange_of(request).refused = refusal.message
                # The status has been sent: the error is the last line, as in Ollama.
                if request.method != "HEAD":
                    await response.write(refusal_bytes(Dialect.OLLAMA, refusal) + b"\n")
            await response.write_eof()
            return response
        finally:
            await answer.close()

    async def _check_unknown(self, model: str) -> None:
        """Check that no node has ``model``, for which an Ollama returned 404.

        Raises:
            Refusal: NOT_FOUND, if one does; the message says how to create it at the Ollama.
        """
        try:
            name = (await self._services.library.find(model)).model.name
        except Refusal:
            return
        raise Refusal(Fault.NOT_FOUND, _NOT_AT_OLLAMA.format(name=name))

    async def _create(self, request: web.Request) -> web.StreamResponse:
        """``/api/create``: forwarded to an Ollama; if no Ollama has the base model, creates a second name."""
        body = fold_keys(await read_object(request), Create)
        changed = None
        if isinstance(text := body.get("modelfile"), str) and text.strip():
            fields = {key: value for key, value in body.items() if value not in (None, "")}
            body = changed = {**modelfile_fields(text), **fields}
            del changed["modelfile"]
        try:
            create = as_type(body, Create)
            base = await self._services.library.find(create.needed) if create.renames else None
        except Refusal:
            # An Ollama may support it, or reports the error itself.
            base = None
        if base is None or base.model.source == "ollama":
            try:
                return await self._relay(request, changed)
            except Refusal as refusal:
                if refusal.status != 501:
                    raise
                create = as_type(body, Create)
                if not create.renames:
                    raise
            base = await self._services.library.find(create.needed)
        await self._services.library.copy(
            base.model.name,
            require_model(create.model or create.name),
            told=name_overrides(create, base.model),
        )
        result = {"status": "success"}
        if create.stream is False:
            return json_response(result)
        return web.Response(body=msgspec.json.encode(result) + b"\n", headers={"Content-Type": NDJSON})

    async def _copy(self, request: web.Request) -> web.Response:
        _, parsed = await read_as(request, Copy)
        source = require_model(parsed.source, "source")
        destination = require_model(parsed.destination, "destination")
        await self._services.library.copy(source, destination, parsed.nodes or ())
        return web.Response()

    async def _delete(self, request: web.Request) -> web.Response:
        _, parsed = await read_as(request, Delete)
        await self._services.library.delete(parsed.wanted, parsed.nodes or ())
        return web.Response()


def _is_digest(text: str) -> bool:
    kind, _, digits = text.replace("-", ":", 1).partition(":")
    return kind == "sha256" and len(digits) == 64 and all(c in "0123456789abcdef" for c in digits)
