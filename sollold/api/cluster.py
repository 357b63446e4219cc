"""``/api/cluster``: the cluster as a whole, and what can be done with it."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

import msgspec
from aiohttp import web

from sollold.api.body import as_type, read_object
from sollold.api.cluster_view import cluster_object, deployment_object, plain_object
from sollold.api.fault_shape import Dialect
from sollold.api.live import LiveRequests
from sollold.api.ollama import json_response
from sollold.api.ollama_request import parse_keep_alive, require_model
from sollold.api.parts import Parts, PlanAsk
from sollold.api.route import Route
from sollold.config import MOST_SLOTS, KvType
from sollold.serving.ask import Fault, Refusal

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
_Slots = Annotated[int, msgspec.Meta(ge=0, le=MOST_SLOTS)]


class PlanBody(msgspec.Struct, kw_only=True):
    """What ``plan`` and ``load`` take.

    ``kv``: the type of both halves of the KV cache; ``layers``: how many layers each node gets, by name or id
    and in the order of the layers, the output counted as one.
    """

    model: str = ""
    context: _Count = 0
    slots: _Slots = 0
    kv: KvType | Literal[""] = ""
    type_k: KvType | Literal[""] = ""
    type_v: KvType | Literal[""] = ""
    policy: Literal["", "fastest", "memory_aware", "even", "spread"] = ""
    layers: dict[str, _Count] = msgspec.field(default_factory=dict)
    embedding: bool = False
    keep_alive: float | str | None = None

    def ask(self) -> PlanAsk:
        """As the leader wants it.

        Raises:
            Refusal: BAD_REQUEST.
        """
        return PlanAsk(
            model=require_model(self.model),
            context=self.context,
            slots=self.slots,
            type_k=self.type_k or self.kv,
            type_v=self.type_v or self.kv,
            policy=self.policy,
            layers=tuple(self.layers.items()),
            embedding=self.embedding,
            keep_alive=parse_keep_alive(self.keep_alive),
        )


class UnloadBody(msgspec.Struct, kw_only=True):
    """``POST /api/cluster/unload``. ``model``: a name or a deployment's id."""

    model: str = ""
    force: bool = False


class DrainBody(msgspec.Struct, kw_only=True):
    """``POST /api/cluster/drain``. ``node``: id or name, empty: the one asked; ``on`` False: back to work."""

    node: str = ""
    on: bool = True


class RouteBody(msgspec.Struct, kw_only=True):
    """``POST /api/cluster/route``."""

    model: str = ""


class ClusterRoutes:
    """The handlers."""

    def __init__(self, parts: Parts, live: LiveRequests) -> None:
        self._parts = parts
        self._live = live

    def routes(self) -> list[Route]:
        """The table."""

        def row(method: str, path: str, handler: Any, summary: str, body: type | None = None) -> Route:
            return Route(method, path, handler, Dialect.OLLAMA, summary, body)

        return [
            row("GET", "/api/cluster", self.show, "Nodes, devices, what runs where, who leads"),
            row(
                "POST",
                "/api/cluster/plan",
                self.plan,
                "What a load would place where, without doing it",
                PlanBody,
            ),
            row(
                "POST", "/api/cluster/load", self.load, "Load a model and wait until it can answer", PlanBody
            ),
            row("POST", "/api/cluster/unload", self.unload, "Unload a model or a deployment", UnloadBody),
            row("GET", "/api/doctor", self.doctor, "What is wrong, and the one command that mends it"),
            row("POST", "/api/cluster/scan", self.scan, "Look for llama.cpp workers on the LAN of this node"),
            row("POST", "/api/cluster/drain", self.drain, "Take a node out of new work, or back", DrainBody),
            row(
                "POST",
                "/api/cluster/route",
                self.route,
                "Who would answer for a model now, and why",
                RouteBody,
            ),
        ]

    async def show(self, request: web.Request) -> web.Response:
        """``GET /api/cluster``; ``requests`` are those that came through this node."""
        cluster = self._parts.cluster
        value = cluster_object(cluster.me, cluster.live(), cluster.leader())
        value["requests"] = self._live.shown()
        return json_response(value)

    async def plan(self, request: web.Request) -> web.Response:
        """``POST /api/cluster/plan``."""
        planned = await self._parts.cluster.plan(as_type(await read_object(request), PlanBody).ask())
        return json_response({"ok": planned.ok, "reason": planned.reason, **planned.plan})

    async def load(self, request: web.Request) -> web.Response:
        """``POST /api/cluster/load``: answers when the model can."""
        cluster = self._parts.cluster
        ask = as_type(await read_object(request), PlanBody).ask()
        record, endpoint = await cluster.load(ask)
        names = {one.node: one.name for one in cluster.live()}
        return json_response({"deployment": endpoint.id, **deployment_object(record, endpoint, names)})

    async def unload(self, request: web.Request) -> web.Response:
        """``POST /api/cluster/unload``."""
        body = as_type(await read_object(request), UnloadBody)
        count = await self._parts.cluster.unload(require_model(body.model), force=body.force)
        return json_response({"unloaded": count})

    async def doctor(self, request: web.Request) -> web.Response:
        """``GET /api/doctor``."""
        found = await asyncio.to_thread(self._parts.findings)
        return json_response({"findings": [msgspec.to_builtins(finding) for finding in found]})

    async def scan(self, request: web.Request) -> web.Response:
        """``POST /api/cluster/scan``: answers when it has looked everywhere."""
        cluster = self._parts.cluster
        named = {worker.address for record in cluster.live() for worker in record.plain}
        found = await cluster.scan()
        return json_response(
            {"workers": [plain_object(one) | {"named": one.address in named} for one in found]}
        )

    async def drain(self, request: web.Request) -> web.Response:
        """``POST /api/cluster/drain``."""
        body = as_type(await read_object(request), DrainBody)
        await self._parts.cluster.drain(body.node, on=body.on)
        return json_response({"node": body.node or self._parts.cluster.me.name, "draining": body.on})

    async def route(self, request: web.Request) -> web.Response:
        """``POST /api/cluster/route``."""
        model = require_model(as_type(await read_object(request), RouteBody).model)
        try:
            listed = await self._parts.library.find(model)
        except Refusal as refusal:
            if refusal.fault is not Fault.NOT_FOUND:
                raise
            # The settings may know what would come of it all the same.
            await self._parts.cluster.plan(PlanAsk(model))
            return json_response({"model": model, "nodes": [], "endpoints": []})
        scores = await self._parts.cluster.scores(listed.model.name)
        return json_response(
            {
                "model": listed.model.name,
                "nodes": list(listed.nodes),
                "endpoints": [
                    {"endpoint": one.endpoint, "node": one.node, "score": one.score, "why": one.why}
                    for one in scores
                ],
            }
        )
