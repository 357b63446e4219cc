"""``/api/batch``: up to ten thousand texts embedded behind everybody's back. Jobs live on the node asked."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
from aiohttp import web

from sollold.api.body import as_type, read_object
from sollold.api.caller import caller_of
from sollold.api.embedder import Embedder
from sollold.api.fault_shape import Dialect
from sollold.api.ollama import json_response
from sollold.api.ollama_embed import shortened
from sollold.api.ollama_models import time_text
from sollold.api.ollama_request import no_reranker, parse_keep_alive, require_model
from sollold.api.parts import Parts
from sollold.api.route import Route
from sollold.serving.ask import Ask, Call, Fault, Refusal
from sollold.serving.batch import Batches, Job

BEHIND_ALL = 1
"""The priority of a batch that names none."""

PAGE = 1000
"""Vectors in one answer of results, at most."""


class BatchBody(msgspec.Struct, kw_only=True):
    """``POST /api/batch/embed``."""

    model: str = ""
    input: list[str] | None = None
    documents: list[str] | None = None
    dimensions: int | None = None
    truncate: bool | None = None
    keep_alive: float | str | None = None
    priority: int | str | None = None
    timeout: float | str | None = None


def job_object(job: Job) -> dict[str, Any]:
    """How a job stands."""
    return {
        "job_id": job.id,
        "model": job.model,
        "status": str(job.progress),
        "total": job.total,
        "completed": job.done - len(job.errors),
        "failed": len(job.errors),
        "progress": round(job.done / job.total, 4),
        "created_at": time_text(job.created),
        "ended_at": time_text(job.ended) if job.ended else None,
        "waiting": job.waiting,
    }


class BatchRoutes:
    """The handlers."""

    def __init__(self, parts: Parts, batches: Batches) -> None:
        self._parts = parts
        self._batches = batches
        self._embedder = Embedder(parts.service)

    def routes(self) -> list[Route]:
        """The table."""

        def row(method: str, path: str, handler: Any, summary: str, **more: Any) -> Route:
            return Route(method, path, handler, Dialect.OLLAMA, summary, **more)

        one = "/api/batch/jobs/{id}"
        return [
            row(
                "POST",
                "/api/batch/embed",
                self.embed,
                "Embed up to 10,000 texts in the background",
                body=BatchBody,
                statuses=(202,),
                turn=True,
            ),
            row("GET", "/api/batch/jobs", self.jobs, "The batches of this node"),
            row("GET", one, self.job, "How a batch stands"),
            row("DELETE", one, self.cancel, "End a batch"),
            row(
                "GET",
                "/api/batch/results/{id}",
                self.results,
                "A batch's vectors, by pages",
                query=(("offset", "the first text"), ("limit", f"vectors of a page, {PAGE} at the most")),
            ),
        ]

    async def embed(self, request: web.Request) -> web.Response:
        """``POST /api/batch/embed``."""
        body = as_type(await read_object(request), BatchBody)
        urgency = body.priority if body.priority is not None else BEHIND_ALL
        caller = caller_of(request, urgency, body.timeout)
        listed = await self._parts.library.find(require_model(body.model))
        texts = body.input if body.input is not None else body.documents
        if not texts:
            raise Refusal(Fault.BAD_REQUEST, "input is required: a list of texts")
        if any(not text for text in texts):
            raise Refusal(Fault.BAD_REQUEST, "an input is empty; an empty text has no embedding")
        if body.dimensions is not None and body.dimensions < 1:
            raise Refusal(Fault.BAD_REQUEST, "dimensions must be at least 1")
        no_reranker(listed.model)
        model, dimensions, truncate = listed.model, body.dimensions, body.truncate is not False
        keep_alive = parse_keep_alive(body.keep_alive)
        ask = Ask(
            id=caller.id,
            model=model.name,
            calls={},
            stream=False,
            keep_alive=keep_alive,
            priority=caller.priority,
            client=caller.client,
            embedding=True,
        )

        numbers = itertools.count()

        async def embed(piece: Sequence[str]) -> list[list[float]]:
            own = replace(ask, id=f"{ask.id}-{next(numbers)}")
            native = {"model": model.name, "input": list(piece), "truncate": truncate}
            found = await self._embedder.embed(
                own, model, piece, Call("/api/embed", native), truncate=truncate
            )
            vectors = found.vectors if found.native is None else found.native.get("embeddings", [])
            return [shortened(vector, dimensions) for vector in vectors]

        job = self._batches.submit(model.name, texts, embed, caller.client, caller.deadline)
        response = json_response(job_object(job), {"Location": f"/api/batch/jobs/{job.id}"})
        response.set_status(202)
        return response

    async def jobs(self, request: web.Request) -> web.Response:
        """``GET /api/batch/jobs``."""
        return json_response({"jobs": [job_object(job) for job in self._batches.jobs()]})

    async def job(self, request: web.Request) -> web.Response:
        """``GET /api/batch/jobs/{id}``."""
        return json_response(job_object(self._batches.job(request.match_info["id"])))

    async def cancel(self, request: web.Request) -> web.Response:
        """``DELETE /api/batch/jobs/{id}``."""
        return json_response(job_object(await self._batches.cancel(request.match_info["id"])))

    async def results(self, request: web.Request) -> web.Response:
        """``GET /api/batch/results/{id}``: what is there already; null where it is not."""
        job = self._batches.job(request.match_info["id"])
        offset = _number(request, "offset", 0, job.total)
        limit = _number(request, "limit", PAGE, PAGE)
        page = job.vectors[offset : offset + limit]
        end = offset + len(page)
        value = {
            **job_object(job),
            "offset": offset,
            "embeddings": [None if vector is None else list(vector) for vector in page],
            "errors": {str(place): text for place, text in job.errors.items() if offset <= place < end},
            "next_offset": end if end < job.total else None,
        }
        return json_response(value)


def _number(request: web.Request, name: str, default: int, most: int) -> int:
    text = request.query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise Refusal(Fault.BAD_REQUEST, f"{name} must be a number from 0")
    return min(int(text), most)
