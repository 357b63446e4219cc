"""``/api/batch``: embeds up to ten thousand texts, by default at the lowest priority.

A job is known only to the node that received it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

from aiohttp import web
from msgspec.structs import replace

from sollold.api.engine.calls import build_ask
from sollold.api.engine.embeddings import Embedder, rows_as_json, shortened
from sollold.api.engine.fields import CallerFields, refuse_reranker, require_model
from sollold.api.http.access import ACCESS, Client, client_of
from sollold.api.http.body import as_type, read_object
from sollold.api.http.caller import caller_of
from sollold.api.http.inflight import InflightRequests
from sollold.api.http.request_log import REQUEST_LOG
from sollold.api.http.response import json_response
from sollold.api.http.route import Route, integer_of
from sollold.api.http.services import AppServices
from sollold.control.keys import Scope
from sollold.errors import bad_request
from sollold.serving.batch import BatchEnded, Batches, Job, no_batch
from sollold.serving.request import Call
from sollold.units import timestamp_text

BATCH_PRIORITY = 1
"""Default priority of a batch."""

PAGE = 1000
"""Maximum number of vectors in one response of results."""


class BatchBody(CallerFields, kw_only=True):
    """``POST /api/batch/embed``."""

    model: str = ""
    input: list[str] | None = None
    documents: list[str] | None = None
    dimensions: int | None = None
    truncate: bool | None = None


def job_object(job: Job) -> dict[str, Any]:
    """Return a job as JSON."""
    return {
        "job_id": job.id,
        "model": job.model,
        "status": str(job.progress),
        "total": job.total,
        "completed": job.done - len(job.errors),
        "failed": len(job.errors),
        "progress": round(job.done / job.total, 4),
        "created_at": timestamp_text(job.created),
        "ended_at": timestamp_text(job.ended) if job.ended else None,
        "waiting": job.waiting,
    }


class BatchRoutes:
    """The handlers of ``/api/batch``."""

    def __init__(self, services: AppServices, batches: Batches, inflight: InflightRequests) -> None:
        self._services = services
        self._inflight = inflight
        self._batches = batches
        self._embedder = Embedder(services.service)

    def routes(self) -> list[Route]:
        """Return the route table."""
        path = "/api/batch/jobs/{id}"
        get, post = partial(Route, "GET"), partial(Route, "POST")
        return [
            post(
                "/api/batch/embed",
                self._embed,
                "Embed up to 10,000 texts in the background",
                BatchBody,
                statuses=(202,),
                inference=True,
            ),
            get("/api/batch/jobs", self._jobs, "The batches of this node"),
            get(path, self._job, "Progress of a batch"),
            Route("DELETE", path, self._cancel, "Cancel a batch"),
            get(
                "/api/batch/results/{id}",
                self._results,
                "A batch's vectors, in pages",
                query=(("offset", "Index of the first text"), ("limit", f"Vectors per page, at most {PAGE}")),
            ),
        ]

    async def _embed(self, request: web.Request) -> web.Response:
        body = as_type(await read_object(request), BatchBody)
        urgency = body.priority if body.priority is not None else BATCH_PRIORITY
        caller = caller_of(request, urgency, body.timeout)
        listed = await self._services.library.find(require_model(body.model))
        texts = body.input if body.input is not None else body.documents
        if not texts:
            raise bad_request("input is required: a list of strings")
        if any(not text for text in texts):
            raise bad_request("an input is empty; an empty string has no embedding")
        if body.dimensions is not None and body.dimensions < 1:
            raise bad_request("dimensions must be at least 1")
        refuse_reranker(listed.model)
        model, dimensions, truncate = listed.model, body.dimensions, body.truncate is not False
        ask = build_ask(caller, model.name, listed, {}, keep_alive=body.keep_alive, embedding=True)
        # The deadline is the whole job's, which may take long, so each request looks the model up again.
        ask = replace(ask, deadline=0.0, resolved=None)
        numbers = itertools.count()
        client, access, path = client_of(request), request.app[ACCESS], request.path
        requests = request.app[REQUEST_LOG]

        async def embed(piece: Sequence[str]) -> list[list[float]]:
            if client.key is not None and not client.local and not access.valid(client.key):
                raise BatchEnded("the API key was revoked or has expired during this batch")
            piece_ask = replace(ask, id=f"{ask.id}-{next(numbers)}")
            native = {"model": model.name, "input": list(piece), "truncate": truncate}
            live = self._inflight.begin(piece_ask, path)
            embedded = await self._embedder.embed(
                piece_ask, model, piece, Call("/api/embed", native), live, truncate=truncate
            )
            # Pieces that fail are tried again, or are errors of the batch.
            requests.count_tokens(client.key, self._inflight.count(live))
            return [shortened(vector, dimensions) for vector in embedded.decoded()]

        job = self._batches.submit(model.name, texts, embed, caller.client, caller.deadline)
        response = json_response(job_object(job), {"Location": f"/api/batch/jobs/{job.id}"})
        response.set_status(202)
        return response

    async def _jobs(self, request: web.Request) -> web.Response:
        client = client_of(request)
        visible = [job for job in self._batches.jobs() if _may_see(client, job)]
        return json_response({"jobs": [job_object(job) for job in visible]})

    async def _job(self, request: web.Request) -> web.Response:
        return json_response(job_object(self._job_of(request)))

    async def _cancel(self, request: web.Request) -> web.Response:
        return json_response(job_object(await self._batches.cancel(self._job_of(request).id)))

    async def _results(self, request: web.Request) -> web.Response:
        """``GET /api/batch/results/{id}``: the vectors so far; null for those that are missing."""
        job = self._job_of(request)
        offset = min(integer_of(request.query, "offset", 0), job.total)
        limit = min(integer_of(request.query, "limit", PAGE), PAGE)
        if limit < 1:
            raise bad_request("limit must be at least 1")
        page = job.vectors[offset : offset + limit]
        end = offset + len(page)
        value = {
            **job_object(job),
            "offset": offset,
            "embeddings": await rows_as_json(page),
            "errors": {str(index): text for index, text in job.errors.items() if offset <= index < end},
            "next_offset": end if end < job.total else None,
        }
        return json_response(value)

    def _job_of(self, request: web.Request) -> Job:
        """Return the job that a request names, if the caller owns it or is an administrator.

        Raises:
            Refusal: NOT_FOUND, also if it belongs to another caller.
        """
        id_ = request.match_info["id"]
        job = self._batches.job(id_)
        if not _may_see(client_of(request), job):
            raise no_batch(id_)
        return job


def _may_see(client: Client, job: Job) -> bool:
    return client.scope is Scope.ADMIN or client.identity == job.client
