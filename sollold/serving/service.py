"""`Service`: a request finds or makes its endpoint, waits its turn, and gets its bytes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from sollold.cluster.peer import PeerCalls
from sollold.cluster.record import InOllama
from sollold.cluster.view import View
from sollold.config import HttpSettings, PlacementSettings, ServingSettings
from sollold.models.library import Listed
from sollold.models.names import Resolved
from sollold.placement.wish import must_shard
from sollold.serving.ask import Answer, Ask, Fault, Refusal, Waiting, unresolved
from sollold.serving.endpoint_server import EndpointServer
from sollold.serving.errand import Errand
from sollold.serving.finding import Means
from sollold.serving.in_line import InLine
from sollold.serving.loader import Loader
from sollold.serving.router import Router, Wish

log = logging.getLogger("sollold.serving")

_CLOSE = 2.0
"""Seconds that callers get to read the error when this node stops."""


class Names(Protocol):
    """What a caller's name for a model means; the library of the cluster's models."""

    async def awaited(self, name: str) -> Resolved:
        """Which model is meant, or why it is not one; waits while not all nodes' models are known."""
        ...

    def get(self, name: str) -> Listed | None:
        """The model itself."""
        ...


class Serving:
    """The node that was asked. Own it: `start`, `close`."""

    def __init__(
        self,
        view: View,
        names: Names,
        calls: PeerCalls,
        server: EndpointServer,
        loader: Loader,
        router: Router,
        serving: ServingSettings,
        http: HttpSettings,
        placement: PlacementSettings | None = None,
    ) -> None:
        self._placement = placement or PlacementSettings()
        self._view = view
        self._names = names
        self._loader = loader
        self._router = router
        self._errands: set[Errand] = set()
        in_line = InLine()
        router.subscribe(in_line.freed)
        self._means = Means(view, calls, server, loader, router, in_line, serving, http)
        self._unsubscribe: Callable[[], None] = lambda: None
        self._idle: asyncio.Event | None = None
        self._refusing = ""

    async def start(self) -> None:
        """Begin to watch the cluster."""
        self._unsubscribe = self._view.subscribe(self._cluster_changed)

    def use(self, serving: ServingSettings, http: HttpSettings) -> None:
        """Other limits from the next request on."""
        self._means = replace(self._means, serving=serving, http=http)

    def refuse(self, reason: str) -> None:
        """Answer no new request; those under way go on."""
        self._refusing = reason

    async def close(self) -> None:
        """Break off what callers here still have under way, with a clear error. May be called twice."""
        self.refuse("this node is stopping; ask another")
        self._unsubscribe()
        self._unsubscribe = lambda: None
        for errand in tuple(self._errands):
            errand.stop("this node is stopping")
        if self._errands:
            # Each ends by itself when its caller reads on; one that is not read is closed here.
            self._idle = asyncio.Event()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), _CLOSE)
        for errand in tuple(self._errands):
            await errand.close()

    @property
    def under_way(self) -> int:
        """Answers being given to callers of this node."""
        return len(self._errands)

    async def open(self, ask: Ask, on_wait: Callable[[Waiting], None]) -> Answer:
        """As `sollold.serving.ask.Service.open`."""
        if self._refusing:
            raise Refusal(Fault.UNAVAILABLE, self._refusing, retry_after=1.0)
        wish = self._wish(ask, await self._names.awaited(ask.model))
        errand = Errand(ask, wish, on_wait, self._means, self._ended)
        self._errands.add(errand)
        try:
            if ask.deadline > 0:
                async with asyncio.timeout(ask.deadline):
                    return await self._begin(errand, ask)
            return await self._begin(errand, ask)
        except TimeoutError:
            await errand.close()
            raise Refusal(
                Fault.TIMEOUT, f"no answer began within the {ask.deadline:g} s that the request allows"
            ) from None
        except BaseException:
            await errand.close()
            raise

    async def _begin(self, errand: Errand, ask: Ask) -> Answer:
        if ask.load_only and ask.keep_alive == 0:
            return await errand.unload()
        if ask.load_only:
            return await errand.load()
        return await errand.open()

    def _wish(self, ask: Ask, resolved: Resolved) -> Wish:
        """Which model is meant.

        Raises:
            Refusal: NOT_FOUND, AMBIGUOUS, UNAVAILABLE.
        """
        if not resolved.name:
            raise unresolved(resolved)
        listed = self._names.get(ask.model)
        digest = listed.model.digest if listed is not None else ""
        trained = listed.model.context_train if listed is not None else 0
        capabilities = listed.model.capabilities if listed is not None else ()
        return Wish(
            model=resolved.name,
            engines=frozenset(ask.calls),
            # Nobody can give more than the model was trained with; the leader reckons so too.
            context=min(ask.context, trained) if trained else ask.context,
            prefix=ask.prefix,
            # A model that only embeds has a server that only embeds, whatever was asked of it.
            embedding=ask.embedding or ("embedding" in capabilities and "completion" not in capabilities),
            digest=digest,
            in_ollama=listed.in_ollama if listed is not None else InOllama(),
            size=listed.model.size if listed is not None else 0,
            sharded=listed is not None and must_shard(self._placement, listed.model.parameters),
        )

    def _ended(self, errand: Errand) -> None:
        self._errands.discard(errand)
        if not self._errands and self._idle is not None:
            self._idle.set()

    def _cluster_changed(self) -> None:
        records = self._view.live()
        self._router.forget(records)
        live = {record.node for record in records}
        for errand in tuple(self._errands):
            if errand.node and errand.node not in live:
                errand.lost(f"node {errand.node} left the cluster or died")
