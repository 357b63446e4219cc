"""`HybridRouter`: small models run on an Ollama or a single machine, large ones on several."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterable, Mapping
from typing import Any, Literal, Self, Unpack, overload

from sollold.client.arguments import check_seconds
from sollold.client.bodies import checked_messages
from sollold.client.coordinator import DISTRIBUTED, Coordinator, coordinator_of, coordinators_in
from sollold.client.daemon_process import DaemonProcess
from sollold.client.discovery import HERE, PORT, named_in_environment, urls_of
from sollold.client.errors import ClientError, InsufficientMemory
from sollold.client.events import Events
from sollold.client.generation import Generation, Record
from sollold.client.http import api_key_of
from sollold.client.pool import OllamaPool, Vectors
from sollold.client.profiles import MODEL_PROFILES, plain_name, profile_of
from sollold.client.request_arguments import ChatArguments, EmbedArguments, Messages
from sollold.client.router_options import RouterOptions, checked_options
from sollold.client.router_placement import RouterPlacement
from sollold.client.stats import Stats
from sollold.client.time_limits import TimeLimits

__all__ = ["MODEL_PROFILES", "HybridRouter", "OllamaPool"]

log = logging.getLogger("sollold.client")

_PLAN_SECONDS = 60.0
_OLLAMA = "ollama:"
"""Prefix of the ids of Ollama endpoints."""
_MAX_POLLS, _POLL_SECONDS = 10, 0.2


class HybridRouter(RouterPlacement, Generation):
    """Routes requests to the cluster. It connects with the first request.

    Arguments apply only to requests of this router; None leaves a choice to the daemons' settings.

    Args:
        ollama_pool: pool whose nodes are used; by default those of ``node``.
        enable_distributed: whether models may be spread over machines.
        auto_discover_rpc: use external llama.cpp workers known to the daemons; False: only those in
            ``rpc_backends``, and the daemons' own.
        auto_setup_rpc: start a daemon on this machine if there is none; it ends with the router. If
            llama.cpp is missing it is built, which takes some minutes once.
        num_rpc_backends: maximum number of machines, besides the head, that a model may be spread over.
        rpc_backends: external workers, ``[{"host": …, "port": …}]``; default: those of ``$RPC_BACKENDS``.
        distributed_threshold_params: billions of parameters from which a model is spread even if it fits one
            machine.
        coordinator_timeout: limit until an answer begins, in seconds, not counting time in a queue.
        gguf_path: file on the daemon's machine to run instead of the named model.
        model_filter: names of the models that may be spread; others run on one machine. None: all may.
        layer_strategy: ``"memory_aware"``: layers in proportion to memory; ``"even"``: equal shares.
        node: URLs of nodes, preferred ones first; see `OllamaPool`.
        api_key: API key, if the nodes require one; see `OllamaPool`.
    """

    def __init__(self, ollama_pool: OllamaPool | None = None, **options: Unpack[RouterOptions]) -> None:
        options = checked_options(options)
        node, api_key = options.get("node"), options.get("api_key")
        if not isinstance(ollama_pool, OllamaPool | None):
            raise TypeError(f"ollama_pool must be a sollold.client.OllamaPool, not {ollama_pool!r}")
        self.ollama_pool = ollama_pool if ollama_pool is not None else OllamaPool(node, api_key=api_key)
        if ollama_pool is not None and node is not None:
            self.ollama_pool.client.nodes.add(urls_of(node))
        if ollama_pool is not None and api_key is not None:
            self.ollama_pool.client.api_key = api_key_of(api_key)
        super().__init__(options)
        self.coordinator_timeout = options.get("coordinator_timeout")
        starts = options.get("auto_setup_rpc", False)
        self._child: DaemonProcess | None = DaemonProcess(self._backends) if starts else None
        self._events = Events()
        self._coordinators: list[Coordinator] = []
        self._ready = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return self.ollama_pool.client.nodes.asked_by(self)

    async def close(self) -> None:
        """Close the connections, and stop the daemon if this router started one."""
        await self.ollama_pool.close()
        if self._child is not None:
            await self._child.stop()
        self._ready = False

    # Requests to models.

    @overload
    async def route_request(
        self, model: str, messages: Messages, *, stream: Literal[True], **more: Unpack[ChatArguments]
    ) -> AsyncGenerator[Record, None]: ...
    @overload
    async def route_request(
        self, model: str, messages: Messages, *, stream: Literal[False] = False, **more: Unpack[ChatArguments]
    ) -> Record: ...
    @overload
    async def route_request(
        self, model: str, messages: Messages, *, stream: bool, **more: Unpack[ChatArguments]
    ) -> Record | AsyncGenerator[Record, None]: ...
    async def route_request(
        self,
        model: str,
        messages: Messages,
        *,
        stream: bool = False,
        priority: int | str | None = None,
        max_tokens: int | None = None,
        timeout: float | None = None,
        **more: Any,
    ) -> Record | AsyncGenerator[Record, None]:
        """Chat with a model: return Ollama's response with ``_routing``, or with ``stream`` an iterator.

        ``_routing`` has ``backend`` (``ollama-pool``, ``llama.cpp-local``, ``llama.cpp-distributed``),
        ``duration_ms``, ``coordinator_url``, ``node``, ``devices``, and if a node was lost
        ``resumed``, ``gap_ms`` and ``lost_nodes``. Arguments are those of `OllamaPool.chat`.

        Raises:
            TimeoutError: after ``timeout``, or the router's ``coordinator_timeout``.
            InsufficientMemory: the model does not fit.
            ClientError: the daemon refused for another reason, or none was reachable.
        """
        body = self._body(
            model, priority, max_tokens, more, ChatArguments, messages=checked_messages(messages)
        )
        return await self._answer("/api/chat", body, stream, timeout)

    def _placement(self, model: str) -> Mapping[str, Any]:
        return self.placement(model)

    async def embed(
        self,
        model: str,
        input: str | Iterable[str],
        *,
        priority: int | str | None = None,
        timeout: float | None = None,
        **more: Unpack[EmbedArguments],
    ) -> Record:
        """Embed one text or several; see `OllamaPool.embed`."""
        timeout = await self._connect_within(timeout)
        return await self.ollama_pool.embed(model, input, priority=priority, timeout=timeout, **more)

    async def batch_embed(
        self,
        model: str,
        inputs: Iterable[str],
        *,
        concurrency: int = 4,
        priority: int | str | None = None,
        timeout: float | None = None,
        **more: Unpack[EmbedArguments],
    ) -> Vectors:
        """Embed many texts, keeping their order; see `OllamaPool.batch_embed`."""
        timeout = await self._connect_within(timeout)
        return await self.ollama_pool.batch_embed(
            model, inputs, concurrency=concurrency, priority=priority, timeout=timeout, **more
        )

    async def _records(
        self, path: str, body: Record, whole: bool, timeout: float | None
    ) -> AsyncGenerator[Record, None]:
        began = time.monotonic()
        await self._connect_within(timeout)
        return self._explained_records(path, body, whole, timeout, began)

    async def _explained_records(
        self, path: str, body: Record, whole: bool, timeout: float | None, began: float
    ) -> AsyncGenerator[Record, None]:
        model = str(body["model"])
        watch = self._events.request(model)
        records = self.ollama_pool.client.stream(
            path,
            body,
            timeout=timeout,
            start_timeout=self.coordinator_timeout,
            began=began,
            whole=whole,
            on_wait=watch.waits,
        )
        try:
            async for record in records:
                if record.get("done"):
                    watch.ends(record.get("_routing") or {})
                    self._remember(model, record.get("_routing") or {})
                yield record
        except ClientError as error:
            explained = await self._explained(error, model, body.get("placement"))
            if explained is error:
                raise
            raise explained from error
        finally:
            await records.aclose()

    async def _explained(self, error: ClientError, model: str, placement: Any) -> ClientError:
        """For insufficient memory, the error with the plan's numbers; else ``error`` unchanged."""
        if error.status != 507 or isinstance(error, InsufficientMemory):
            return error
        missing: Mapping[str, Any] = {}
        try:
            plan = await self.ollama_pool.client.post(
                "/api/cluster/plan", _with_placement({"model": model}, placement), timeout=_PLAN_SECONDS
            )
            missing = plan.get("missing") or {}
        except ClientError as failure:
            log.debug("no plan tells what is missing: %s", failure.message)
        return _too_big(error.message, missing)

    # Plans for models.

    async def should_use_distributed(self, model: str) -> bool:
        """Whether ``model`` would now be answered by several machines, according to the cluster's plan.

        For a model that the cluster does not have, its profile decides (`MODEL_PROFILES`).

        Raises:
            InsufficientMemory: it would not run at all.
            ClientError: the model is unknown, or no daemon was reachable.
        """
        return bool((await self.explain(model))["distributed"])

    async def explain(self, model: str) -> Record:
        """How ``model`` would be answered now: the plan with its reasons, and ``distributed``.

        Raises:
            InsufficientMemory: it would not run; with the numbers.
            ClientError: the model is unknown, or no daemon was reachable.
        """
        await self.connect()
        client, placement = self.ollama_pool.client, self.placement(model)
        try:
            body = _with_placement({"model": model}, placement)
            plan: Record = await client.post("/api/cluster/plan", body, timeout=_PLAN_SECONDS)
        except ClientError as error:
            profile = profile_of(model)
            if error.status != 404 or profile is None:
                raise
            return await self._by_profile(model, profile)
        if not plan["ok"]:
            raise _too_big(plan["reason"], plan.get("missing") or {})
        plan["distributed"] = await self._is_distributed(plan)
        return plan

    async def _is_distributed(self, plan: Record) -> bool:
        endpoint = str(plan.get("endpoint") or "")
        if endpoint.startswith(_OLLAMA):
            return False
        # A recent load may not be known to every node yet.
        for _ in range(_MAX_POLLS if endpoint else 0):
            cluster = await self.ollama_pool.client.get("/api/cluster")
            for deployment in cluster["deployments"]:
                if deployment["id"] == endpoint:
                    return bool(deployment["backend"] == DISTRIBUTED)
            await asyncio.sleep(_POLL_SECONDS)
        shares = (plan.get("plan") or {}).get("shares") or ()
        return any(share["node"] != plan["plan"]["head"] or ":" in share["device"] for share in shares)

    async def _by_profile(self, model: str, profile: Mapping[str, Any]) -> Record:
        """An estimate, from its profile, for a model that the cluster does not have."""
        cluster = await self.ollama_pool.client.get("/api/cluster")
        largest = max((node["total"] for node in cluster["nodes"]), default=0)
        size = float(profile.get("estimated_memory_gb") or 0.0) * 1e9
        distributed = self._may_distribute(model) and (self._must_distribute(profile) or 0 < largest < size)
        return {
            "ok": True,
            "verdict": "profile",
            "reason": f"no node has {model}; by its profile it needs about {size / 1e9:g} GB",
            "distributed": distributed,
        }

    # Coordinators.

    @property
    def coordinator(self) -> Coordinator | None:
        """The coordinator of this router's models as last seen (see `refresh`), or None."""
        return self._coordinators[0] if self._coordinators else None

    @property
    def coordinators(self) -> list[Coordinator]:
        """All coordinators of this router's models, as last seen."""
        return list(self._coordinators)

    @property
    def coordinator_model(self) -> str | None:
        """The name of the model that `coordinator` runs, or None."""
        return self.coordinator.model if self.coordinator is not None else None

    async def refresh(self) -> list[Coordinator]:
        """Ask the cluster for the coordinators of this router's models; the last used comes first.

        Raises:
            ClientError: no daemon was reachable.
        """
        await self.connect()
        last = self._coordinators[0].model if self._coordinators else ""
        found = coordinators_in(await self.ollama_pool.client.get("/api/cluster"))
        own = [c for c in found if self._may_distribute(c.model)]
        self._coordinators = sorted(own, key=lambda c: plain_name(c.model) != plain_name(last))
        return self.coordinators

    def get_stats(self) -> Stats:
        """Counters of the daemons since their start; see `sollold.client.stats.cluster_stats`.

        To be awaited, except by a caller without a running event loop, who gets the result at once.

        Raises:
            ClientError: no daemon was reachable.
        """

        async def ask() -> Record:
            await self.connect()
            return await self.ollama_pool.get_stats()

        async def ask_apart() -> Record:
            async with OllamaPool() as pool:
                pool.client = self.ollama_pool.client.apart()
                return await pool.get_stats()

        return Stats(ask, ask_apart)

    def _remember(self, model: str, routing: Mapping[str, Any]) -> None:
        """Remember the coordinator named in an answer, which saves a request."""
        coordinator = coordinator_of(model, routing)
        if coordinator is not None:
            others = [c for c in self._coordinators if plain_name(c.model) != plain_name(coordinator.model)]
            self._coordinators = [coordinator, *others]

    # The cluster and its settings.

    async def connect(self) -> None:
        """Find the cluster, or start a daemon if configured. Called by the first request.

        Raises:
            ClientError: no daemon was reachable or could be started.
        """
        ended = self._child is not None and self._child.ended
        if self._ready and not ended:
            return
        client = self.ollama_pool.client
        if self._child is not None and (ended or not len(client.nodes)) and not named_in_environment():
            await self._child.ensure()
            client.nodes.add([HERE])
        try:
            cluster = await client.get("/api/cluster")
        except ClientError as error:
            if error.status != 404:
                raise
            url = next((known.url for known in client.nodes.order()), HERE)
            raise ClientError(
                f"what answers at {url} is not sollold: it has no /api/cluster. If it is an Ollama, name "
                f"the sollold of that machine instead (port {PORT}), which uses it",
                404,
            ) from error
        if self._ready:
            return  # by another of the first requests
        self._ready = True
        self._events.connected(cluster, self.enable_distributed, bool(self._backends))

    async def _connect_within(self, timeout: float | None) -> float | None:
        """`connect` within the time limit of a request; returns the remaining seconds.

        Raises:
            TimeoutError: the limit passed.
            ClientError: as `connect`.
        """
        check_seconds("timeout", timeout)
        limits = TimeLimits(time.monotonic(), timeout, None)
        await limits.within(self.connect())
        return None if timeout is None else max(0.001, timeout - limits.elapsed())


def _with_placement(body: Record, placement: Any) -> Record:
    return {**body, "placement": placement} if placement else body


def _too_big(message: str, missing: Mapping[str, Any]) -> InsufficientMemory:
    return InsufficientMemory(
        message,
        needed=int(missing.get("needed") or 0),
        there=int(missing.get("there") or 0),
        missing=int(missing.get("missing") or 0),
        remedies=tuple(str(remedy) for remedy in missing.get("remedies") or ()),
    )
