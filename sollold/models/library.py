"""The models of the whole cluster, merged from the lists of its nodes, each listed once.

A model's header facts are requested from a node that has the file, by the peer calls ``shape``
(`ShapeRequest` → `Shape`) and ``metadata`` (`MetadataRequest` → `Metadata`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

from sollold.bounded import BoundedDict
from sollold.cluster.gossip.record_check import bad_value
from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_client import RpcClient
from sollold.cluster.net.rpc_server import RpcServer
from sollold.cluster.net.view import View, name_of
from sollold.facts import dataclass
from sollold.models.footprint.shape import Shape
from sollold.models.gguf.vocabulary import compatible
from sollold.models.listing import Listed, Merger
from sollold.models.model import Model
from sollold.models.names import NameIndex, Resolved, behind_alias, exact, resolve, unresolved
from sollold.models.node_lists import NodeLists
from sollold.models.stores.catalogue import Catalogue
from sollold.models.stores.name_owners import distinct_names
from sollold.subscribers import Subscribers

_TIMEOUT = 15.0
_MAX_SHAPES = 16
_MAX_RESOLVED = 1000
"""Maximum number of resolved names that are cached until the set of models changes."""
_SETTLE_SECONDS = 5.0
"""Seconds to wait, for an unknown name, until this node has learnt of the others' models."""
_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class ShapeRequest:
    """Requests a model's shape from a node that has its files."""

    name: str


@dataclass(frozen=True, slots=True)
class MetadataRequest:
    """Requests the key-value pairs of a model's header from a node that has its files.

    ``whole``: include the values of long arrays.
    """

    name: str
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Metadata:
    """A header's key-value pairs."""

    pairs: dict[str, str | int | float | bool | list[str | int | float | bool]]


class _Merged(NamedTuple):
    """The lists of the live nodes: by name the model and its (node, model) pairs, and the names."""

    listed: dict[str, Listed]
    holders: dict[str, tuple[tuple[str, Model], ...]]
    names: NameIndex


class Library:
    """The models of the cluster.

    Reading never blocks, except in `awaited` and `named`; only `shape` and `metadata` call other nodes.

    Attributes:
        lists: the lists of the individual nodes; the owner must start and close it.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        view: View,
        calls: RpcClient,
        server: RpcServer,
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        """Register the peer methods with ``server``, which must not have started."""
        self._catalogue = catalogue
        self._view = view
        self._calls = calls
        self._aliases = dict(aliases or {})
        self._away: dict[str, tuple[tuple[Model, ...], NameIndex]] = {}
        """The lists of offline nodes, and the names in them."""
        self._resolved: BoundedDict[str, Resolved] = BoundedDict(_MAX_RESOLVED)
        """Cached results of `resolve` for the models known now."""
        self.lists = NodeLists(catalogue, view, calls, server, self._changed)
        self._shapes: BoundedDict[str, Shape] = BoundedDict(_MAX_SHAPES)
        self._merger = Merger()
        self._merged_lists: _Merged | None = None
        self._subscribers = Subscribers("the models of the cluster")
        server.method("shape", ShapeRequest, self._answer_shape)
        server.method("metadata", MetadataRequest, self._answer_metadata)

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call ``callback`` on the loop when any node's models change. Returns an unsubscribe function."""
        return self._subscribers.add(callback)

    def use_aliases(self, aliases: Mapping[str, str]) -> None:
        """Replace the user's aliases."""
        self._aliases = dict(aliases)
        self._resolved.clear()

    def all(self) -> tuple[Listed, ...]:
        """Return every model once, sorted by name.

        Different content under a name that is already taken is distinguished by its tag
        (`sollold.models.listing.merge`).
        """
        return tuple(self._merged().listed.values())

    def resolve(self, name: str) -> Resolved:
        """Resolve a caller's name to a model."""
        return self._with_offline(self._resolve_live(name))

    async def awaited(self, name: str) -> Resolved:
        """Resolve a name, but wait before reporting that there is no such model.

        A node that has just started or joined must not report a model as missing that others have. While it
        does not yet know all their models it waits, for a few seconds at most.
        """
        end = asyncio.get_running_loop().time() + _SETTLE_SECONDS
        while True:
            resolved = self.resolve(name)
            final = resolved.name or resolved.candidates or self.lists.settled()
            if final:
                return resolved
            if asyncio.get_running_loop().time() >= end:
                return replace(resolved, unread=self._catalogue.unread)
            await asyncio.sleep(_POLL_SECONDS)

    async def named(self, name: str) -> Listed:
        """Return the model that a caller means by ``name``; waits as `awaited` does.

        Raises:
            Refusal: NOT_FOUND; AMBIGUOUS with the candidates; UNAVAILABLE while the nodes that have it are
                offline or stores are still being read for the first time.
        """
        listed = self.get(name)
        if listed is None:
            resolved = await self.awaited(name)
            listed = self._merged().listed.get(resolved.name)
            if listed is None:
                raise unresolved(resolved)
        return listed

    def get(self, name: str) -> Listed | None:
        """Return the model that a caller means by ``name``, or None unless it is exactly one."""
        return self._merged().listed.get(self._resolve_live(name).name)

    def exact(self, name: str) -> Resolved:
        """Resolve ``name`` without guessing (only aliases and case), for models to be pulled or deleted."""
        return self._with_offline(exact(name, self._merged().names, self._aliases))

    def behind_alias(self, name: str) -> str:
        """Return the target if ``name`` is an alias in this node's settings, else an empty string."""
        target = behind_alias(name, self._aliases)
        return target if target != name.strip() else ""

    def holders(self, listed: str) -> tuple[tuple[str, Model], ...]:
        """Like `find`, for a name exactly as in `all`."""
        return self._merged().holders.get(listed, ())

    def find(self, name: str) -> tuple[tuple[str, Model], ...]:
        """Return (node, model) for each live node that has the content; each model has its node's own paths.

        Empty when the name is not exactly one model; `resolve` says why.
        """
        return self._merged().holders.get(self._resolve_live(name).name, ())

    def nodes_with(self, digest: str) -> tuple[str, ...]:
        """Return the live nodes that have usable files of a model with this content digest."""
        live = [self._view.me.node, *(record.node for record in self._view.live())]
        return tuple(
            node
            for node in dict.fromkeys(live)
            if any(m.digest == digest and m.files and not m.unusable for m in self.lists.of(node))
        )

    def with_vocabulary(self, vocabulary: str) -> tuple[tuple[tuple[str, Model], ...], ...]:
        """Return the holders, as `find` does, of each model with a vocabulary similar to ``vocabulary``."""
        return tuple(
            holders
            for holders in self._merged().holders.values()
            if holders and compatible(holders[0][1].vocabulary, vocabulary)
        )

    async def shape(self, node: str, model: Model) -> Shape:
        """Return the model's shape, requested from ``node``; cached by content digest.

        Raises:
            LookupError: the node can't be reached or can't read the file; the message says why.
        """
        shape = self._shapes.get(model.digest)
        if shape is None:
            shape = self._shapes[model.digest] = await self._fetch_shape(node, model)
        return shape

    async def metadata(self, name: str, *, whole: bool = False) -> dict[str, object]:
        """Return the key-value pairs of a model's header, or an empty dict.

        Tries up to three nodes that have the model in turn. ``whole``: include the values of long arrays.
        """
        for node, model in self.find(name)[:3]:
            if node == self._view.me.node:
                return await self._catalogue.metadata(model.name, whole=whole)
            request = MetadataRequest(self.name_at(node, model), whole)
            with contextlib.suppress(PeerError):
                answer = await self._calls.call(node, "metadata", request, Metadata, timeout=_TIMEOUT)
                return dict(answer.pairs)
        return {}

    async def _fetch_shape(self, node: str, model: Model) -> Shape:
        name = self.name_at(node, model)
        if node == self._view.me.node:
            return await self._own_shape(name)
        try:
            shape = await self._calls.call(node, "shape", ShapeRequest(name), Shape, timeout=_TIMEOUT)
        except PeerError as error:
            raise LookupError(str(error)) from None
        if reason := bad_value(shape):
            raise LookupError(f"{name_of(self._view, node)} sent a bad header of {model.name!r}: {reason}")
        return shape

    def name_at(self, node: str, model: Model) -> str:
        """Return the name under which the node itself lists the content."""
        models = self.lists.of(node)
        names = [m.name for m in models if m.digest == model.digest and m.files == model.files]
        return model.name if model.name in names or not names else names[0]

    def listed_at(self, node: str, listed: Model) -> str:
        """Return a node's own name for a model from `all`; empty when the node does not have that model."""
        for entry in self.lists.of(node):
            names = (entry.name, *distinct_names(entry, None))
            if entry.digest == listed.digest and listed.name.lower() in [name.lower() for name in names]:
                return entry.name
        return ""

    def _resolve_live(self, name: str) -> Resolved:
        names = self._merged().names
        found = self._resolved.get(name)
        if found is None:
            found = self._resolved[name] = resolve(name, names, self._aliases)
        return found

    def _with_offline(self, resolved: Resolved) -> Resolved:
        """Fill in which offline nodes have the model: it is then temporarily unavailable, not unknown.

        Lists of offline nodes are kept as long as their records are.
        """
        if resolved.name or resolved.candidates:
            return resolved
        away, lists = [], self.lists.away()
        self._away = {
            node: known
            if (known := self._away.get(node)) is not None and known[0] is models
            else (models, NameIndex(model.name for model in models))
            for node, models in lists.items()
        }
        for node, (_, index) in self._away.items():
            match = resolve(resolved.asked, index, suggest=False)
            record = self._view.record(node)
            if record is not None and (match.name or match.candidates):
                away.append(record.name)
        return replace(resolved, away=tuple(away))

    def _changed(self) -> None:
        self._merged_lists = None
        self._subscribers.notify()

    def _merged(self) -> _Merged:
        if self._merged_lists is None:
            listed, holders = self._merger.merge(self.lists.live())
            self._merged_lists = _Merged(listed, holders, NameIndex(listed))
            self._resolved.clear()
        return self._merged_lists

    async def _own_shape(self, name: str) -> Shape:
        """Return the shape of a model on this node.

        Raises:
            LookupError: its files can't be read, or the numbers in its header are too large to send.
        """
        shape = await self._catalogue.shape(name)
        if reason := bad_value(shape):
            raise LookupError(f"the header of {name!r} is damaged: {reason}. Download it again.")
        return shape

    async def _answer_shape(self, caller: str, request: ShapeRequest) -> Shape:
        try:
            return await self._own_shape(request.name)
        except LookupError as error:
            raise PeerError(self._view.me.node, str(error.args[0]), transport=False) from None

    async def _answer_metadata(self, caller: str, request: MetadataRequest) -> Metadata:
        pairs = await self._catalogue.metadata(request.name, whole=request.whole)
        return Metadata(pairs)  # type: ignore[arg-type]
