"""``/api/cluster``: the cluster's state, and operations on it."""

from __future__ import annotations

import time
from functools import partial
from typing import Annotated, Literal

import msgspec
from aiohttp import web

from sollold.api.cluster.views import (
    cluster_object,
    deployment_object,
    external_worker_object,
    names_of,
    stats_object,
)
from sollold.api.engine.fields import parse_keep_alive, require_model
from sollold.api.engine.placement import PlacementBody, PolicyName, prepare_placement
from sollold.api.http.access import ACCESS, require
from sollold.api.http.body import as_type, read_object
from sollold.api.http.inflight import InflightRequests
from sollold.api.http.response import json_response
from sollold.api.http.route import Route, integer_of
from sollold.api.http.services import AppServices
from sollold.control.keys import Scope
from sollold.control.logs import MOST_LINES
from sollold.errors import Fault, Refusal
from sollold.leader.messages import Ensure
from sollold.serving.routing import load_warnings
from sollold.settings.schema import MOST_SLOTS, KvType, Speculate

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
_WORDS = ("kv", "type_k", "type_v", "policy")
"""Fields of a plan that take one of a few words."""
_Slots = Annotated[int, msgspec.Meta(ge=1, le=MOST_SLOTS)]


class PlanBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body of ``plan`` and ``load``.

    ``online``: whether a plan may look up a model that no node has in Ollama's registry; ``kv``: the type of
    both halves of the KV cache; ``layers``: number of layers per node, by name or id and in the order of the
    layers; the output counts as one.
    """

    model: str = ""
    context: _Count = 0
    slots: _Slots | None = None
    kv: KvType | Literal[""] = ""
    type_k: KvType | Literal[""] = ""
    type_v: KvType | Literal[""] = ""
    policy: PolicyName = ""
    speculation: Speculate | None = None
    placement: PlacementBody = msgspec.field(default_factory=PlacementBody)
    layers: dict[str, _Count] = msgspec.field(default_factory=dict)
    embedding: bool = False
    keep_alive: float | str | None = None
    online: bool = False

    def ask(self) -> Ensure:
        """Return the request to the leader. Forms of the body that are meant for people are checked here.

        Raises:
            Refusal: BAD_REQUEST.
        """
        return Ensure(
            model=require_model(self.model),
            context=self.context,
            slots=self.slots or 0,
            type_k=self.type_k or self.kv,
            type_v=self.type_v or self.kv,
            placement=self.placement.wish(self.policy, self.speculation or ""),
            fixed=tuple(self.layers.items()),
            embedding=self.embedding,
            keep_alive=parse_keep_alive(self.keep_alive),
        )


class UnloadBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``POST /api/cluster/unload``. ``model``: a model's name or a deployment's id."""

    model: str = ""
    force: bool = False


class DrainBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``POST /api/cluster/drain``. ``node``: id or name, empty for this one; ``on``: False ends draining."""

    node: str = ""
    on: bool = True


class RouteBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``POST /api/cluster/route``."""

    model: str = ""


class ClusterRoutes:
    """The handlers of ``/api/cluster`` and ``/api/doctor``."""

    def __init__(self, services: AppServices, inflight: InflightRequests) -> None:
        self._services = services
        self._inflight = inflight

    def routes(self) -> list[Route]:
        """Return the route table."""
        get, post = partial(Route, "GET"), partial(Route, "POST")
        return [
            get("/api/cluster", self._show, "Nodes, devices, deployments and the leader"),
            get("/api/cluster/stats", self._stats, "Counters of this node since its start"),
            post(
                "/api/cluster/plan", self._plan, "Where a model would be placed, without loading it", PlanBody
            ),
            post("/api/cluster/load", self._load, "Load a model and wait until it is ready", PlanBody),
            post("/api/cluster/unload", self._unload, "Unload a model or a deployment", UnloadBody),
            get(
                "/api/cluster/logs/{model:.+}",
                self._logs,
                "The last log lines of a model's engines, from every node that takes part",
                query=(("lines", f"Lines per engine, at most {MOST_LINES}; default 50"),),
            ),
            get("/api/doctor", self._doctor, "Problems, and how to fix them"),
            post("/api/cluster/scan", self._scan, "Look for llama.cpp workers on the LAN"),
            post("/api/cluster/drain", self._drain, "Drain a node, or end a drain", DrainBody),
            post(
                "/api/cluster/route", self._route, "Which endpoints could answer for a model now", RouteBody
            ),
        ]

    async def _show(self, request: web.Request) -> web.Response:
        """``GET /api/cluster``; ``requests`` are those received by this node."""
        cluster = self._services.cluster
        offline = self._services.monitor.offline()
        value = cluster_object(cluster.me, cluster.live(), cluster.leader(), offline)
        value["auth"] = "open" if request.app[ACCESS].open else "keys"
        value["requests"] = self._inflight.shown()
        return json_response(value)

    async def _stats(self, request: web.Request) -> web.Response:
        return json_response(stats_object(self._services.cluster.me, self._services.counters, time.time()))

    async def _plan_body(self, request: web.Request) -> PlanBody:
        """Return the body of a plan or a load, with a GGUF file replaced by its model.

        Raises:
            Refusal: BAD_REQUEST.
        """
        fields = await read_object(request)
        # Case is ignored, as in a model's name and the kind of speculation.
        fields |= {name: text.lower() for name in _WORDS if isinstance(text := fields.get(name), str)}
        body = as_type(fields, PlanBody)
        body.model = await prepare_placement(request, self._services, body.placement) or body.model
        return body

    async def _plan(self, request: web.Request) -> web.Response:
        body = await self._plan_body(request)
        permit = partial(_permit_online, request)
        planned = await self._services.cluster.plan(body.ask(), online=body.online, permit=permit)
        return json_response({"ok": planned.ok, "reason": planned.reason, **planned.plan})

    async def _load(self, request: web.Request) -> web.Response:
        cluster = self._services.cluster
        ask = (await self._plan_body(request)).ask()
        record, endpoint = await cluster.load(ask)
        names = names_of(cluster.live(), self._services.monitor.offline())
        value = {"deployment": endpoint.id, **deployment_object(record, endpoint, names)}
        if warnings := load_warnings(ask, endpoint):
            value["warnings"] = list(warnings)
        return json_response(value)

    async def _logs(self, request: web.Request) -> web.Response:
        lines = min(integer_of(request.query, "lines", 50), MOST_LINES)
        logs = await self._services.logs.tail(request.match_info["model"], lines)
        return json_response({"logs": msgspec.to_builtins(logs)})

    async def _unload(self, request: web.Request) -> web.Response:
        body = as_type(await read_object(request), UnloadBody)
        dropped = await self._services.cluster.unload(require_model(body.model), force=body.force)
        forgotten = {"forgotten": True} if dropped.forgotten else {}
        cancelled = {"cancelled": True} if dropped.cancelled else {}
        return json_response({"unloaded": len(dropped.ended)} | forgotten | cancelled)

    async def _doctor(self, request: web.Request) -> web.Response:
        findings = await self._services.findings()
        return json_response({"findings": [msgspec.to_builtins(finding) for finding in findings]})

    async def _scan(self, request: web.Request) -> web.Response:
        """``POST /api/cluster/scan``: responds when the scan is complete."""
        cluster = self._services.cluster
        configured = {worker.address for record in cluster.live() for worker in record.plain}
        workers = await cluster.scan()
        return json_response(
            {"workers": [external_worker_object(w) | {"named": w.address in configured} for w in workers]}
        )

    async def _drain(self, request: web.Request) -> web.Response:
        body = as_type(await read_object(request), DrainBody)
        await self._services.cluster.drain(body.node, on=body.on)
        return json_response({"node": body.node or self._services.cluster.me.name, "draining": body.on})

    async def _route(self, request: web.Request) -> web.Response:
        model = require_model(as_type(await read_object(request), RouteBody).model)
        try:
            listed = await self._services.library.find(model)
        except Refusal as refusal:
            if refusal.fault is not Fault.NOT_FOUND:
                raise
            # The settings may define a model that no node has: planning refuses only unknown names.
            await self._services.cluster.plan(Ensure(model), permit=partial(_permit_online, request))
            return json_response({"model": model, "nodes": [], "endpoints": []})
        scores = await self._services.cluster.scores(listed.model.name)
        return json_response(
            {
                "model": listed.model.name,
                "nodes": self._services.library.node_names(listed),
                "endpoints": [
                    {"endpoint": score.endpoint, "node": score.node, "score": score.score, "why": score.why}
                    for score in scores
                ],
            }
        )


def _permit_online(request: web.Request) -> None:
    """Require the scope for downloads: a header may have hundreds of megabytes, and $HF_TOKEN is used."""
    require(request, Scope.MODELS, "planning for a model that no node has")
