"""The models of the whole cluster, each once, from the lists of its nodes.

A record carries the digest of its node's list; the list itself is fetched by a peer call when that changes.
Peer methods registered here: ``models`` (`ListModelsRequest` → `ModelList`) and ``shape`` (`ShapeRequest` →
`Shape`), ``metadata`` (`ShapeRequest` → `Metadata`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace

from sollold.cluster.gossip.record_check import bad_values
from sollold.cluster.net.rpc import PeerCalls, PeerError, PeerServer
from sollold.cluster.net.view import View, name_of
from sollold.facts import dataclass
from sollold.models.footprint.shape import Shape
from sollold.models.gguf.vocabulary import alike
from sollold.models.listing import Listed, merge
from sollold.models.model import Model
from sollold.models.model_check import objection
from sollold.models.names import Resolved, exact, resolve, unresolved
from sollold.models.stores.catalogue import Catalogue
from sollold.models.stores.name_owners import distinct_names

log = logging.getLogger("sollold.models")

_TIMEOUT = 15.0
_AGAIN = 5.0
"""Seconds before a list that could not be fetched is asked for again."""
_SHAPES = 16
_MEANT = 1000
"""Callers' names whose meaning is remembered, until models come or go."""
_SETTLE = 5.0
"""Seconds that an unknown name waits for this node to learn of the others' models."""
_LOOK = 0.1


@dataclass(frozen=True, slots=True)
class ListModelsRequest:
    """Asks a node for its models. ``refresh``: it is to look at its stores first."""

    refresh: bool = False


@dataclass(frozen=True, slots=True)
class ModelList:
    """A node's models and the digest that its record carries for them."""

    digest: str
    models: tuple[Model, ...]


@dataclass(frozen=True, slots=True)
class ShapeRequest:
    """Asks a node that has the model's files what its header says."""

    name: str


@dataclass(frozen=True, slots=True)
class Metadata:
    """A header's key-value pairs, long arrays left out."""

    pairs: dict[str, str | int | float | bool | list[str | int | float | bool]]


_UNKNOWN = ModelList("", ())


class Library:
    """What the cluster has. Reading never waits but in `awaited`; only `shape` and `metadata` ask others."""

    def __init__(
        self,
        catalogue: Catalogue,
        view: View,
        calls: PeerCalls,
        server: PeerServer,
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        """Registers its peer methods with ``server``, which must not have started."""
        self._catalogue = catalogue
        self._view = view
        self._calls = calls
        self._aliases = dict(aliases or {})
        self._meant: dict[str, Resolved] = {}
        """What callers' names mean among the models that are known now."""
        self.sources: list[Callable[[], Awaitable[None]]] = []
        """What else than the catalogue is to look anew when a list must be current."""
        self._lists: dict[str, ModelList] = {}
        self._wanted = asyncio.Event()
        self._fetches: dict[str, asyncio.Task[None]] = {}
        self._retry_at: dict[str, float] = {}
        self._shapes: dict[str, Shape] = {}
        self._shelf: tuple[dict[str, Listed], dict[str, tuple[tuple[str, Model], ...]]] | None = None
        self._callbacks: list[Callable[[], None]] = []
        self._undo: list[Callable[[], None]] = []
        self._task: asyncio.Task[None] | None = None
        server.method("models", ListModelsRequest, self._answer_models)
        server.method("shape", ShapeRequest, self._answer_shape)
        server.method("metadata", ShapeRequest, self._answer_metadata)

    async def start(self) -> None:
        """Publish our list's digest and begin to fetch the others'. The catalogue must have started."""
        self._undo = [self._catalogue.subscribe(self._mine), self._view.subscribe(self._wanted.set)]
        self._mine()
        self._wanted.set()
        self._task = asyncio.create_task(self._run(), name="library")

    async def close(self) -> None:
        """End all fetches."""
        for undo in self._undo:
            undo()
        tasks = [*self._fetches.values(), *([self._task] if self._task else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._task = None
        self._fetches = {}

    async def refresh(self, node: str) -> None:
        """Learn what a node has now: what was just created, fetched or deleted there shows afterwards.

        One that can't be asked is left as it is known.
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

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call ``callback`` on the loop when the models of any node have changed; the answer ends that."""
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback) if callback in self._callbacks else None

    def use_aliases(self, aliases: Mapping[str, str]) -> None:
        """The user's own names from now on."""
        self._aliases = dict(aliases)
        self._meant.clear()

    def all(self) -> tuple[Listed, ...]:
        """Every model once, by name. Of other content under a taken name, the digest is in the tag."""
        return tuple(self._shelves()[0].values())

    def resolve(self, name: str) -> Resolved:
        """Which model a caller means."""
        return self._or_away(self._here(name))

    async def awaited(self, name: str) -> Resolved:
        """As `resolve`, for a caller who would be told that no such model.

        A node that was just started, or joined, must not call a model missing that others have: while it does
        not know all their models it waits, some seconds at the most.
        """
        end = asyncio.get_running_loop().time() + _SETTLE
        while True:
            resolved = self.resolve(name)
            known = resolved.name or resolved.candidates or self.settled()
            if known or asyncio.get_running_loop().time() >= end:
                return resolved
            await asyncio.sleep(_LOOK)

    async def named(self, name: str) -> Listed:
        """The model that a caller means by ``name``; waits as `awaited` does.

        Raises:
            Refusal: NOT_FOUND; AMBIGUOUS with the candidates; UNAVAILABLE while those who have it are away.
        """
        listed = self.get(name)
        if listed is None:
            resolved = await self.awaited(name)
            listed = self._shelves()[0].get(resolved.name)
            if listed is None:
                raise unresolved(resolved)
        return listed

    def get(self, name: str) -> Listed | None:
        """The model that a caller means by ``name``; None when it is not exactly one."""
        return self._shelves()[0].get(self._here(name).name)

    def exact(self, name: str) -> Resolved:
        """Which model ``name`` is, with nothing guessed but an alias: for what is fetched or removed."""
        return self._or_away(exact(name, self._shelves()[0], self._aliases))

    def holders(self, listed: str) -> tuple[tuple[str, Model], ...]:
        """As `find`, for a name just as `all` has it."""
        return self._shelves()[1].get(listed, ())

    def settled(self) -> bool:
        """Whether the models of all live nodes are known, and a leader: else there may be more nodes."""
        others = [record for record in self._view.live() if record.node != self._view.me.node]
        known = all(
            not record.models or self._lists.get(record.node, _UNKNOWN).digest == record.models
            for record in others
        )
        return known and bool(self._view.leader().leader)

    def find(self, name: str) -> tuple[tuple[str, Model], ...]:
        """(node, model) for each live node that has the content; each with its own node's paths.

        Empty when the name is not exactly one model; `resolve` says why.
        """
        return self._shelves()[1].get(self._here(name).name, ())

    def nodes_with(self, digest: str) -> tuple[str, ...]:
        """The live nodes that can read the files of a model with this content."""
        live = [self._view.me.node, *(record.node for record in self._view.live())]
        return tuple(
            node
            for node in dict.fromkeys(live)
            if any(one.digest == digest and one.files and not one.unusable for one in self.models_of(node))
        )

    def with_vocabulary(self, vocabulary: str) -> tuple[tuple[tuple[str, Model], ...], ...]:
        """As `find`, of each model whose vocabulary is like this one."""
        return tuple(
            holders
            for holders in self._shelves()[1].values()
            if holders and alike(holders[0][1].vocabulary, vocabulary)
        )

    def models_of(self, node: str) -> tuple[Model, ...]:
        """One node's own list, as last fetched."""
        if node == self._view.me.node:
            return self._catalogue.models
        known = self._lists.get(node)
        return known.models if known else ()

    async def shape(self, node: str, model: Model) -> Shape:
        """What the model's header says, asked of ``node``; remembered by content.

        Raises:
            LookupError: the node can't be asked or can't read the file; the message says why.
        """
        shape = self._shapes.get(model.digest)
        if shape is None:
            shape = await self._ask_shape(node, model)
            while len(self._shapes) >= _SHAPES:
                del self._shapes[next(iter(self._shapes))]
            self._shapes[model.digest] = shape
        return shape

    async def metadata(self, name: str) -> dict[str, object]:
        """The header's key-value pairs of a model, from the first node that answers; else empty."""
        for node, model in self.find(name)[:3]:
            if node == self._view.me.node:
                return await self._catalogue.metadata(model.name)
            local = self.name_at(node, model)
            with contextlib.suppress(PeerError):
                answer = await self._calls.call(
                    node, "metadata", ShapeRequest(local), Metadata, timeout=_TIMEOUT
                )
                return dict(answer.pairs)
        return {}

    async def _ask_shape(self, node: str, model: Model) -> Shape:
        name = self.name_at(node, model)
        if node == self._view.me.node:
            return await self._catalogue.shape(name)
        try:
            shape = await self._calls.call(node, "shape", ShapeRequest(name), Shape, timeout=_TIMEOUT)
        except PeerError as error:
            raise LookupError(f"node {node} can't tell the shape of {model.name!r}: {error}") from None
        if why := next(bad_values(shape), ""):
            raise LookupError(f"node {node} tells no possible shape of {model.name!r}: {why}")
        return shape

    def name_at(self, node: str, model: Model) -> str:
        """What the node itself calls the content."""
        models = self.models_of(node)
        same = [other.name for other in models if other.digest == model.digest and other.files == model.files]
        return model.name if model.name in same or not same else same[0]

    def listed_at(self, node: str, listed: Model) -> str:
        """The name in the node's own list behind one of `all`; empty when the node has not just that."""
        for other in self.models_of(node):
            shown = (other.name, *distinct_names(other, None))
            if other.digest == listed.digest and listed.name.lower() in [name.lower() for name in shown]:
                return other.name
        return ""

    def _here(self, name: str) -> Resolved:
        known = self._shelves()[0]
        found = self._meant.get(name)
        if found is None:
            found = resolve(name, known, self._aliases)
            if len(self._meant) >= _MEANT:
                self._meant.clear()
            self._meant[name] = found
        return found

    def _or_away(self, resolved: Resolved) -> Resolved:
        """A model of nodes that are not there now is missing for a while, which is not "no such model".

        Their lists are kept as long as their records are.
        """
        if resolved.name or resolved.candidates:
            return resolved
        live = {record.node for record in self._view.live()}
        away = []
        for node in sorted(self._lists.keys() - live):
            meant = resolve(resolved.asked, [model.name for model in self._lists[node].models])
            record = self._view.record(node)
            if record is not None and (meant.name or meant.candidates):
                away.append(record.name)
        return replace(resolved, away=tuple(away))

    def _mine(self) -> None:
        self._view.update_me(models=self._catalogue.digest)
        self._changed()

    def _changed(self) -> None:
        self._shelf = None
        for callback in tuple(self._callbacks):
            callback()

    def _shelves(self) -> tuple[dict[str, Listed], dict[str, tuple[tuple[str, Model], ...]]]:
        if self._shelf is None:
            live = {record.node for record in self._view.live()}
            lists = {node: known.models for node, known in self._lists.items() if node in live}
            lists[self._view.me.node] = self._catalogue.models
            self._shelf = merge(lists)
            self._meant.clear()
        return self._shelf

    async def _run(self) -> None:
        """Keep a list of every live node."""
        loop = asyncio.get_running_loop()
        known: frozenset[str] = frozenset()
        while True:
            self._wanted.clear()
            live = {record.node: record.models for record in self._view.live()}
            if frozenset(live) != known:
                known = frozenset(live)
                for node in [node for node in self._lists if self._view.record(node) is None]:
                    del self._lists[node]
                self._retry_at = {node: at for node, at in self._retry_at.items() if node in live}
                self._changed()
            now, delay = loop.time(), None
            for node, digest in live.items():
                mine = node == self._view.me.node
                have = self._lists.get(node)
                if mine or not digest or node in self._fetches or (have and have.digest == digest):
                    continue
                left = self._retry_at.get(node, 0.0) - now
                if left <= 0:
                    self._fetches[node] = asyncio.create_task(self._fetch(node), name=f"models of {node}")
                else:
                    delay = min(left, delay) if delay is not None else left
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wanted.wait(), delay)

    async def _fetch(self, node: str) -> None:
        loop = asyncio.get_running_loop()
        try:
            got = await self._calls.call(node, "models", ListModelsRequest(), ModelList, timeout=_TIMEOUT)
        except PeerError as error:
            log.info("the models of %s can't be fetched just now: %s", name_of(self._view, node), error)
            self._retry_at[node] = loop.time() + _AGAIN
        else:
            self._learn(node, got)
            record = self._view.record(node)
            if record is not None and record.models != got.digest:
                # The record is behind the list or the list behind the record: ask again, but not at once.
                self._retry_at[node] = loop.time() + 1.0
        finally:
            del self._fetches[node]
            self._wanted.set()

    def _learn(self, node: str, got: ModelList) -> None:
        # What a node of another release may call a model must not keep the others' from being found.
        self._lists[node] = replace(got, models=tuple(one for one in got.models if not self._odd(node, one)))
        self._changed()

    def _odd(self, node: str, model: Model) -> bool:
        why = objection(model)
        if why:
            log.info("a model of %s is left out: %s", name_of(self._view, node), why)
        return bool(why)

    async def _answer_models(self, caller: str, request: ListModelsRequest) -> ModelList:
        if request.refresh:
            await self._refresh_own()
        return ModelList(self._catalogue.digest, self._catalogue.models)

    async def _answer_shape(self, caller: str, request: ShapeRequest) -> Shape:
        try:
            return await self._catalogue.shape(request.name)
        except LookupError as error:
            raise PeerError(self._view.me.node, str(error.args[0]), transport=False) from None

    async def _answer_metadata(self, caller: str, request: ShapeRequest) -> Metadata:
        return Metadata(await self._catalogue.metadata(request.name))  # type: ignore[arg-type]
