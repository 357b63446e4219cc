"""`Serving`: answers the requests that this node receives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from sollold.cluster.net.rpc_client import RpcClient
from sollold.cluster.net.view import View, name_of
from sollold.errors import Fault, Refusal
from sollold.leader.draft_models import with_drafter_named
from sollold.leader.wish import PlacementWish
from sollold.models.library import Library
from sollold.models.listing import Listed
from sollold.placement.request import must_shard
from sollold.serving.attempts import BYPASS_PATHS
from sollold.serving.candidate import EndpointQuery
from sollold.serving.counters import Counters
from sollold.serving.endpoint_server import EndpointServer
from sollold.serving.engine_deaths import Quarantine
from sollold.serving.executor import RequestExecutor
from sollold.serving.loader import Loader
from sollold.serving.opening import QueueWaiters, ServingContext
from sollold.serving.request import Answer, Ask, Waiting
from sollold.serving.router import Router
from sollold.settings.schema import HttpSettings, PlacementSettings, ServingSettings
from sollold.turns import sleep_until_set
from sollold.units import seconds_text

_CLOSE_SECONDS = 2.0
"""Seconds that callers have to read the error when this node stops."""


class Serving:
    """The `Service` of the node that receives requests. The owner calls `start` and `close`."""

    def __init__(
        self,
        view: View,
        library: Library,
        calls: RpcClient,
        server: EndpointServer,
        loader: Loader,
        router: Router,
        serving: ServingSettings,
        http: HttpSettings,
        placement: PlacementSettings | None = None,
        counters: Counters | None = None,
    ) -> None:
        self._counters = counters or Counters()
        self._placement = placement or PlacementSettings()
        self._view = view
        self._library = library
        self._router = router
        self._executors: set[RequestExecutor] = set()
        waiters = QueueWaiters()
        router.on_request_end = waiters.freed
        self._context = ServingContext(
            view, calls, server, loader, router, waiters, Quarantine(), serving, http
        )
        self._unsubscribe: Callable[[], None] = lambda: None
        self._idle: asyncio.Event | None = None
        self._refusing = ""

    async def start(self) -> None:
        """Start watching the cluster for lost nodes."""
        self._unsubscribe = self._view.subscribe(self._cluster_changed)

    def use_settings(
        self, serving: ServingSettings, http: HttpSettings, placement: PlacementSettings
    ) -> None:
        """Apply changed settings from the next request on."""
        self._context = replace(self._context, serving=serving, http=http)
        self._placement = placement

    def refuse(self, reason: str) -> None:
        """Accept no new requests; running ones continue. ``reason``: such as "this node is stopping"."""
        self._refusing = reason

    def refuse_waiting(self) -> None:
        """After `refuse`, also refuse requests that wait for an engine if no node that accepts requests has
        the model. They would only delay the end.
        """
        accepting = {record.node for record in self._view.live() if not record.draining}
        for executor in tuple(self._executors) if self._refusing else ():
            holders = {node for node, _ in self._library.holders(executor.model)}
            # If no node lists the model any more, any node that accepts requests may have an engine soon.
            if executor.waiting and not (accepting & holders if holders else accepting):
                executor.stop(self._refusing)

    async def close(self) -> None:
        """End the running requests of this node's callers with a clear error. May be called twice."""
        self.refuse("this node is stopping")
        self._unsubscribe()
        self._unsubscribe = lambda: None
        for executor in tuple(self._executors):
            executor.stop(self._refusing)
        if self._executors:
            # Each ends by itself when its caller reads on; the others are closed below.
            self._idle = asyncio.Event()
            await sleep_until_set(self._idle, _CLOSE_SECONDS)
        for executor in tuple(self._executors):
            await executor.close()

    @property
    def under_way(self) -> int:
        """Number of running requests of this node's callers."""
        return len(self._executors)

    async def open(self, ask: Ask, on_wait: Callable[[Waiting], None]) -> Answer:
        """Find or load an endpoint, wait for a slot, and send the request; see `Service.open`."""
        self._check_accepting()
        listed = ask.resolved
        if listed is None:
            listed = await self._library.named(ask.model)
            # That may take seconds.
            self._check_accepting()
        wish = ask.placement
        if wish.speculation:
            wish = with_drafter_named(self._library, wish)
        query = _query(ask, listed, wish, self._placement)
        executor = RequestExecutor(ask, query, on_wait, self._context, self._ended)
        self._executors.add(executor)
        try:
            async with asyncio.timeout(ask.deadline or None):
                return await self._begin(executor, ask)
        except TimeoutError:
            await executor.close()
            raise Refusal(
                Fault.TIMEOUT,
                f"no response began within the request's deadline of {seconds_text(ask.deadline)}",
            ) from None
        except BaseException:
            await executor.close()
            raise

    def _check_accepting(self) -> None:
        if self._refusing:
            raise Refusal(Fault.UNAVAILABLE, f"{self._refusing}; use another node", retry_after=1.0)

    async def _begin(self, executor: RequestExecutor, ask: Ask) -> Answer:
        if ask.load_only and ask.keep_alive == 0:
            return await executor.unload()
        if ask.load_only:
            return await executor.load()
        answer = await executor.open()
        if not any(call.path in BYPASS_PATHS for call in ask.calls.values()):
            self._counters.answered(answer.routing.backend)
            self._counters.resumed += ask.delivered is not None
        return answer

    def _ended(self, executor: RequestExecutor) -> None:
        if executor in self._executors:
            self._counters.resumed += executor.resumed
        self._executors.discard(executor)
        if not self._executors and self._idle is not None:
            self._idle.set()

    def _cluster_changed(self) -> None:
        records = self._view.live()
        self._router.forget(records)
        live = {record.node for record in records}
        for executor in tuple(self._executors):
            if executor.node and executor.node not in live:
                executor.node_lost(f"{name_of(self._view, executor.node)} left the cluster or failed")


def _query(ask: Ask, listed: Listed, wish: PlacementWish, placement: PlacementSettings) -> EndpointQuery:
    """Return what ``ask`` needs of an endpoint."""
    model = listed.model
    trained = model.context_train
    return EndpointQuery(
        model=model.name,
        engines=frozenset(ask.calls),
        # More than the trained context is never given; the leader calculates in the same way.
        context=min(ask.context, trained) if trained else ask.context,
        usual=min(placement.context, trained) if trained else placement.context,
        trained=trained,
        prefix=ask.prefix,
        # The server of a model that only embeds only embeds, whatever the request.
        embedding=ask.embedding or model.only_embeds,
        digest=model.digest,
        in_ollama=listed.in_ollama,
        size=model.size,
        sharded=must_shard(wish.over(placement), model.parameters),
        placement=wish,
    )
