"""Keeps the list of models of each node, as known to this node.

A record carries the digest of its node's list; when that changes, the list itself is fetched by the peer call
``models`` (`ListModelsRequest` → `ModelList`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace

from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_client import RpcClient
from sollold.cluster.net.rpc_server import RpcServer
from sollold.cluster.net.view import View, name_of
from sollold.facts import dataclass
from sollold.models.model import Model
from sollold.models.model_check import objection
from sollold.models.stores.catalogue import Catalogue
from sollold.tasks import cancel_and_wait
from sollold.turns import sleep_until_set

log = logging.getLogger("sollold.models")

_TIMEOUT = 15.0
_RETRY_SECONDS = 5.0
"""Seconds before a failed fetch of a list is retried."""


@dataclass(frozen=True, slots=True)
class ListModelsRequest:
    """Requests a node's models. ``refresh``: rescan its stores first."""

    refresh: bool = False


@dataclass(frozen=True, slots=True)
class ModelList:
    """A node's models and the digest that its record carries for them."""

    digest: str
    models: tuple[Model, ...]


_UNKNOWN = ModelList("", ())


class NodeLists:
    """Keeps the list of every node for as long as its record is kept. Call `start` and `close`.

    Args:
        changed: called on the loop when the models of any node may have changed.

    Attributes:
        sources: further refresh functions to call, before the catalogue's, when this node's list must be
            current.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        view: View,
        calls: RpcClient,
        server: RpcServer,
        changed: Callable[[], None],
    ) -> None:
        self._catalogue = catalogue
        self._view = view
        self._calls = calls
        self._changed = changed
        self.sources: list[Callable[[], Awaitable[None]]] = []
        self._lists: dict[str, ModelList] = {}
        self._live: frozenset[str] = frozenset()
        self._wanted = asyncio.Event()
        self._fetches: dict[str, asyncio.Task[None]] = {}
        self._retry_at: dict[str, float] = {}
        self._failed: dict[str, str] = {}
        """Error of the last failed fetch from each node; it is logged once."""
        self._undo: list[Callable[[], None]] = []
        self._task: asyncio.Task[None] | None = None
        server.method("models", ListModelsRequest, self._answer)

    async def start(self) -> None:
        """Publish the digest of this node's list and start fetching the others. Start the catalogue first."""
        self._undo = [self._catalogue.subscribe(self._publish), self._view.subscribe(self._view_changed)]
        self._publish()
        self._wanted.set()
        self._task = asyncio.create_task(self._run(), name="models of all nodes")

    async def close(self) -> None:
        """Cancel all fetches."""
        for undo in self._undo:
            undo()
        await cancel_and_wait(*self._fetches.values(), self._task)
        self._task = None
        self._fetches = {}

    def of(self, node: str) -> tuple[Model, ...]:
        """Return one node's own list, as last fetched."""
        if node == self._view.me.node:
            return self._catalogue.models
        return self._lists.get(node, _UNKNOWN).models

    def live(self) -> dict[str, tuple[Model, ...]]:
        """Return the lists of the live nodes, including this one."""
        live = {record.node for record in self._view.live()}
        lists = {node: entry.models for node, entry in self._lists.items() if node in live}
        return {**lists, self._view.me.node: self._catalogue.models}

    def away(self) -> dict[str, tuple[Model, ...]]:
        """Return the last known lists of offline nodes, by node id."""
        live = {record.node for record in self._view.live()}
        return {node: self._lists[node].models for node in sorted(self._lists.keys() - live)}

    def settled(self) -> bool:
        """Return whether the models of all live nodes are known and there is a leader.

        Without a leader there may be nodes that are not known yet.
        """
        others = [record for record in self._view.live() if record.node != self._view.me.node]
        known = all(
            not record.models or self._lists.get(record.node, _UNKNOWN).digest == record.models
            for record in others
        )
        return known and not self._catalogue.unread and bool(self._view.leader().leader)

    async def refresh(self, node: str) -> None:
        """Update a node's list, so that models just created, pulled or deleted there are reflected in it.

        The list of a node that can't be reached stays unchanged.
        """
        if node == self._view.me.node:
            await self._refresh_own()
            return
        request = ListModelsRequest(refresh=True)
        with contextlib.suppress(PeerError):
            self._learn(node, await self._calls.call(node, "models", request, ModelList, timeout=_TIMEOUT))

    async def _refresh_own(self) -> None:
        for source in (*self.sources, self._catalogue.refresh):
            await source()

    def _publish(self) -> None:
        self._view.update_me(models=self._catalogue.digest)
        self._changed()

    def _view_changed(self) -> None:
        """React to a change of the view.

        When a node returns, its last known models are listed again at once: a request that comes before
        they are fetched must find them."""
        live = frozenset(record.node for record in self._view.live())
        if live != self._live:
            self._live = live
            self._changed()
        self._wanted.set()

    async def _run(self) -> None:
        """Fetch the lists of live nodes as they change."""
        loop = asyncio.get_running_loop()
        nodes: frozenset[str] = frozenset()
        while True:
            self._wanted.clear()
            live = {record.node: record.models for record in self._view.live()}
            if frozenset(live) != nodes:
                nodes = frozenset(live)
                for node in [node for node in self._lists if self._view.record(node) is None]:
                    del self._lists[node]
                self._retry_at = {node: deadline for node, deadline in self._retry_at.items() if node in live}
                self._failed = {node: error for node, error in self._failed.items() if node in live}
            now, delay = loop.time(), None
            me = self._view.me.node
            for node, digest in live.items():
                old = self._lists.get(node)
                if node == me or not digest or node in self._fetches or (old and old.digest == digest):
                    continue
                remaining = self._retry_at.get(node, 0.0) - now
                if remaining <= 0:
                    self._fetches[node] = asyncio.create_task(self._fetch(node), name=f"models of {node}")
                else:
                    delay = min(remaining, delay) if delay is not None else remaining
            await sleep_until_set(self._wanted, delay)

    async def _fetch(self, node: str) -> None:
        loop = asyncio.get_running_loop()
        try:
            fetched = await self._calls.call(node, "models", ListModelsRequest(), ModelList, timeout=_TIMEOUT)
        except PeerError as error:
            level = logging.DEBUG if self._failed.get(node) == str(error) else logging.INFO
            self._failed[node] = str(error)
            name = name_of(self._view, node)
            log.log(level, "the models of %s can't be fetched just now: %s", name, error)
            self._retry_at[node] = loop.time() + _RETRY_SECONDS
        else:
            self._failed.pop(node, None)
            self._learn(node, fetched)
            record = self._view.record(node)
            if record is not None and record.models != fetched.digest:
                # Record and list disagree: one of them is newer. Ask again, but not at once.
                self._retry_at[node] = loop.time() + 1.0
        finally:
            del self._fetches[node]
            self._wanted.set()

    def _learn(self, node: str, fresh: ModelList) -> None:
        # An invalid entry from a node of another release must not hide that node's other models.
        self._lists[node] = replace(fresh, models=tuple(m for m in fresh.models if not self._bad(node, m)))
        self._changed()

    def _bad(self, node: str, model: Model) -> bool:
        reason = objection(model)
        if reason:
            log.info("a model of %s is left out: %s", name_of(self._view, node), reason)
        return bool(reason)

    async def _answer(self, caller: str, request: ListModelsRequest) -> ModelList:
        if request.refresh:
            await self._refresh_own()
        return ModelList(self._catalogue.digest, self._catalogue.models)
