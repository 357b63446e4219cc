"""The models of the whole cluster, each once, from the lists of its nodes.

What a model's header says is asked of a node that has the file, by the peer calls ``shape`` (`ShapeRequest` →
`Shape`) and ``metadata`` (`MetadataRequest` → `Metadata`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace

from sollold.cluster.gossip.record_check import bad_value
from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_client import Calls
from sollold.cluster.net.rpc_server import Peers
from sollold.cluster.net.view import View, name_of
from sollold.facts import dataclass
from sollold.models.footprint.shape import Shape
from sollold.models.gguf.vocabulary import alike
from sollold.models.listing import Listed, merge
from sollold.models.model import Model
from sollold.models.names import Resolved, behind_alias, exact, resolve, unresolved
from sollold.models.node_lists import NodeLists
from sollold.models.stores.catalogue import Catalogue
from sollold.models.stores.name_owners import distinct_names
from sollold.subscribers import Subscribers

_TIMEOUT = 15.0
_SHAPES = 16
_MEANT = 1000
"""Callers' names whose meaning is remembered, until models come or go."""
_SETTLE = 5.0
"""Seconds that an unknown name waits for this node to learn of the others' models."""
_LOOK = 0.1


@dataclass(frozen=True, slots=True)
class ShapeRequest:
    """Asks a node that has the model's files what its header says."""

    name: str


@dataclass(frozen=True, slots=True)
class MetadataRequest:
    """Asks such a node for the header's key-value pairs; ``whole``: with the values of long arrays."""

    name: str
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Metadata:
    """A header's key-value pairs."""

    pairs: dict[str, str | int | float | bool | list[str | int | float | bool]]


class Library:
    """What the cluster has. Reading never waits but in `awaited`; only `shape` and `metadata` ask others.

    Attributes:
        lists: the nodes' own lists, to be started and closed.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        view: View,
        calls: Calls,
        server: Peers,
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        """Registers its peer methods with ``server``, which must not have started."""
        self._catalogue = catalogue
        self._view = view
        self._calls = calls
        self._aliases = dict(aliases or {})
        self._meant: dict[str, Resolved] = {}
        """What callers' names mean among the models that are known now."""
        self.lists = NodeLists(catalogue, view, calls, server, self._changed)
        self._shapes: dict[str, Shape] = {}
        self._shelf: tuple[dict[str, Listed], dict[str, tuple[tuple[str, Model], ...]]] | None = None
        self._subscribers = Subscribers("the models of the cluster")
        server.method("shape", ShapeRequest, self._answer_shape)
        server.method("metadata", MetadataRequest, self._answer_metadata)

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call ``callback`` on the loop when the models of any node have changed; the answer ends that."""
        return self._subscribers.add(callback)

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
            known = resolved.name or resolved.candidates or self.lists.settled()
            if known:
                return resolved
            if asyncio.get_running_loop().time() >= end:
                return replace(resolved, unread=self._catalogue.unread)
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

    def behind_alias(self, name: str) -> str:
        """The name that ``name`` stands for by this node's settings; empty where it is no alias."""
        target = behind_alias(name, self._aliases)
        return target if target != name.strip() else ""

    def holders(self, listed: str) -> tuple[tuple[str, Model], ...]:
        """As `find`, for a name just as `all` has it."""
        return self._shelves()[1].get(listed, ())

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
            if any(one.digest == digest and one.files and not one.unusable for one in self.lists.of(node))
        )

    def with_vocabulary(self, vocabulary: str) -> tuple[tuple[tuple[str, Model], ...], ...]:
        """As `find`, of each model whose vocabulary is like this one."""
        return tuple(
            holders
            for holders in self._shelves()[1].values()
            if holders and alike(holders[0][1].vocabulary, vocabulary)
        )

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

    async def metadata(self, name: str, *, whole: bool = False) -> dict[str, object]:
        """The header's key-value pairs of a model, from the first node that answers; else empty.

        ``whole``: with the values of long arrays.
        """
        for node, model in self.find(name)[:3]:
            if node == self._view.me.node:
                return await self._catalogue.metadata(model.name, whole=whole)
            request = MetadataRequest(self.name_at(node, model), whole)
            with contextlib.suppress(PeerError):
                answer = await self._calls.call(node, "metadata", request, Metadata, timeout=_TIMEOUT)
                return dict(answer.pairs)
        return {}

    async def _ask_shape(self, node: str, model: Model) -> Shape:
        name = self.name_at(node, model)
        if node == self._view.me.node:
            return await self._catalogue.shape(name)
        try:
            shape = await self._calls.call(node, "shape", ShapeRequest(name), Shape, timeout=_TIMEOUT)
        except PeerError as error:
            raise LookupError(str(error)) from None
        if why := bad_value(shape):
            raise LookupError(f"{name_of(self._view, node)} sent a bad header of {model.name!r}: {why}")
        return shape

    def name_at(self, node: str, model: Model) -> str:
        """What the node itself calls the content."""
        models = self.lists.of(node)
        same = [other.name for other in models if other.digest == model.digest and other.files == model.files]
        return model.name if model.name in same or not same else same[0]

    def listed_at(self, node: str, listed: Model) -> str:
        """The name in the node's own list behind one of `all`; empty when the node has not just that."""
        for other in self.lists.of(node):
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
        away = []
        for node, models in self.lists.away().items():
            meant = resolve(resolved.asked, [model.name for model in models])
            record = self._view.record(node)
            if record is not None and (meant.name or meant.candidates):
                away.append(record.name)
        return replace(resolved, away=tuple(away))

    def _changed(self) -> None:
        self._shelf = None
        self._subscribers.notify()

    def _shelves(self) -> tuple[dict[str, Listed], dict[str, tuple[tuple[str, Model], ...]]]:
        if self._shelf is None:
            self._shelf = merge(self.lists.live())
            self._meant.clear()
        return self._shelf

    async def _answer_shape(self, caller: str, request: ShapeRequest) -> Shape:
        try:
            return await self._catalogue.shape(request.name)
        except LookupError as error:
            raise PeerError(self._view.me.node, str(error.args[0]), transport=False) from None

    async def _answer_metadata(self, caller: str, request: MetadataRequest) -> Metadata:
        pairs = await self._catalogue.metadata(request.name, whole=request.whole)
        return Metadata(pairs)  # type: ignore[arg-type]
