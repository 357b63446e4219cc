"""Offers the cluster to the dialects: the view, the leader's preview, loads, drains and the router."""

from __future__ import annotations

import asyncio
import secrets
import shlex
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import field, replace
from typing import Any

import msgspec

from sollold.cluster.gossip.record import Backend, Endpoint, Record, State
from sollold.cluster.gossip.term import Term
from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_client import RpcClient
from sollold.cluster.net.rpc_server import RpcServer
from sollold.cluster.net.view import View
from sollold.control.nodes import node_named
from sollold.engines.commands import Done
from sollold.errors import Fault, Refusal, bad_request
from sollold.facts import dataclass
from sollold.leader.client import LeaderClient
from sollold.leader.leader import Leader
from sollold.leader.messages import Drop, Dropped, Ensure
from sollold.leader.snapshot import loaded_of
from sollold.machine.external_worker import ExternalState, ExternalWorker
from sollold.models.library import Library
from sollold.models.names import resolve
from sollold.models.transfer.remote_header import RemoteError, RemoteHeaders, on_hub
from sollold.placement.request import names_drafter
from sollold.serving.candidate import EndpointQuery
from sollold.serving.loader import Loader, Need
from sollold.serving.request import Answer, Ask, Call, Engine, Waiting
from sollold.serving.router import Router
from sollold.units import bytes_text

DRAIN_CALL = 5.0
_USABLE = (ExternalState.USABLE, ExternalState.TAKEN, ExternalState.BUSY)


@dataclass(frozen=True, slots=True)
class DrainOrder:
    """Peer method ``drain``: accept no new work, or accept it again."""

    on: bool


@dataclass(frozen=True, slots=True)
class KeepOrder:
    """Peer method ``keep``: set how long a deployment may be idle, in seconds; negative: forever."""

    deployment: str
    keep_alive: float


@dataclass(frozen=True, slots=True)
class Planned:
    """A preview of a load; ``reason``: its message, or why the load is impossible."""

    ok: bool
    reason: str = ""
    plan: dict[str, Any] = field(default_factory=dict)
    """The `PlanPreview` as JSON, from `msgspec.to_builtins`."""


@dataclass(frozen=True, slots=True)
class Scored:
    """One endpoint with the router's score."""

    endpoint: str
    node: str
    score: float
    why: str


class ClusterService:
    """Operations on the whole cluster: plan, load, unload, drain, scores.

    Args:
        drain: starts to empty this node of requests (True), or lets it accept work again.
        keep: sets how long a deployment of this node may be idle.
        scan: looks for external workers.
        name_external: watches external workers like those named in the settings; returns their states.
        serve: serves a request, as `sollold.serving.request.Service.open`.
        limit: timeout of a load, in seconds; it may be changed later.
        remote: reads headers of models that no node has.
    """

    def __init__(
        self,
        view: View,
        library: Library,
        calls: RpcClient,
        leader: Leader,
        loader: Loader,
        router: Router,
        drain: Callable[[bool], Awaitable[None]],
        keep: Callable[[str, float], None],
        scan: Callable[[], Awaitable[tuple[ExternalWorker, ...]]],
        name_external: Callable[[Sequence[str]], Awaitable[tuple[ExternalWorker, ...]]],
        serve: Callable[[Ask, Callable[[Waiting], None]], Awaitable[Answer]],
        limit: float,
        remote: RemoteHeaders,
    ) -> None:
        self._remote = remote
        self._view = view
        self._library = library
        self._calls = calls
        self._leader = leader
        self._client = LeaderClient(view, calls)
        self._loader = loader
        self._router = router
        self._drain = drain
        self._keep = keep
        self._scan = scan
        self._name_external = name_external
        self._serve = serve
        self.limit = limit

    def register(self, server: RpcServer) -> None:
        """Register the peer methods ``drain`` and ``keep``."""
        server.method("drain", DrainOrder, self._on_drain)
        server.method("keep", KeepOrder, self._on_keep)

    @property
    def me(self) -> Record:
        """This node's own record."""
        return self._view.me

    def live(self) -> tuple[Record, ...]:
        """Return the records of the live nodes, including this one."""
        return self._view.live()

    def leader(self) -> Term:
        """Return the current leader and its term."""
        return self._view.leader()

    async def plan(
        self, ask: Ensure, *, online: bool = False, permit: Callable[[], None] = lambda: None
    ) -> Planned:
        """Preview a load without doing it.

        If no node has the model, its header is read from where it would be fetched: from the Hugging Face Hub
        if its name says so, or with ``online`` from Ollama's registry. ``permit`` is called before; it raises
        `Refusal` if the caller may not cause that.

        Raises:
            Refusal: NOT_FOUND, AMBIGUOUS, as ``permit``.
        """
        ask = await self._with_drafter(ask)
        try:
            ask = await self._resolved(ask)
        except Refusal as refusal:
            if refusal.fault is not Fault.NOT_FOUND:
                raise
            if online or on_hub(ask.model):
                permit()
                return await self._plan_remote(ask)
            outline = self._leader.outline_from_profile(ask.model)
            if outline is None:
                raise
            return Planned(outline.ok, outline.message, msgspec.to_builtins(outline))
        preview = await self._leader.preview(ask)
        return Planned(preview.ok, preview.message, msgspec.to_builtins(preview))

    async def _plan_remote(self, ask: Ensure) -> Planned:
        try:
            remote = await self._remote.read(ask.model)
        except RemoteError as error:
            fault = Fault.NOT_FOUND if error.missing else Fault.UNAVAILABLE
            raise Refusal(fault, f"no node has {ask.model}, and {error}") from None
        name, size = remote.model.name, bytes_text(remote.model.size)
        preview = await self._leader.preview(replace(ask, model=name), (remote.model, remote.shape))
        begin = f"No node has {name} yet; planned as if {self._view.me.name} had it. "
        message = f"{begin}{preview.message}" if preview.ok else preview.message
        if preview.ok:
            message += f" To fetch it: sollold pull {shlex.quote(name)} ({size})."
        preview = replace(preview, message=message)
        return Planned(preview.ok, message, msgspec.to_builtins(preview))

    async def load(self, ask: Ensure) -> tuple[Record, Endpoint]:
        """Load a model and wait until it is ready.

        Raises:
            Refusal: NOT_FOUND, AMBIGUOUS, TOO_BIG with the bytes missing, UNAVAILABLE, TIMEOUT, ENGINE.
        """
        ask = await self._resolved(await self._with_drafter(ask))
        loop = asyncio.get_running_loop()
        limit = self.limit
        end = loop.time() + limit
        while True:
            remaining = max(0.0, end - loop.time())
            ready = await self._loader.ready(Need(ask, remaining, waited=limit - remaining), _ignore_progress)
            found = self._view.record(ready.node) if ready is not None else None
            if ready is not None and found is not None:
                break
            await asyncio.sleep(0.1)
        endpoint = ready.endpoint
        if endpoint.backend is Backend.OLLAMA:
            # An embedding model refuses the request that loads, and with keep_alive 0 that would unload.
            if endpoint.embedding or ask.keep_alive == 0 or (endpoint.loaded and ask.keep_alive is None):
                return found, endpoint
            return await self._load_in_ollama(ask, max(1.0, end - loop.time())) or (found, endpoint)
        self._check_context(ask, endpoint, ready.reasons)
        if ask.keep_alive is not None:
            await self._keep_for(ready.node, endpoint.id, ask.keep_alive)
        return found, endpoint

    async def _load_in_ollama(self, ask: Ensure, limit: float) -> tuple[Record, Endpoint] | None:
        """Have Ollama load the model and keep it for ``keep_alive``; until now it only has the file.

        Return where it is loaded, if the records show it.
        """
        body: dict[str, Any] = {"model": ask.model, "stream": False}
        if ask.keep_alive is not None:
            body["keep_alive"] = ask.keep_alive
        if ask.context:
            body["options"] = {"num_ctx": ask.context}
        answer = await self._serve(
            Ask(
                id=f"load-{secrets.token_hex(6)}",
                model=ask.model,
                calls={Engine.OLLAMA: Call("/api/generate", body)},
                stream=False,
                load_only=True,
                context=ask.context,
                keep_alive=ask.keep_alive,
                deadline=limit,
            ),
            _ignore_progress,
        )
        async for _ in answer.events:
            pass
        for record in self._view.live():
            for endpoint in record.endpoints if record.name == answer.routing.node else ():
                if endpoint.backend is Backend.OLLAMA and endpoint.is_of(
                    ask.model, ask.digest, ask.in_ollama
                ):
                    return record, replace(endpoint, loaded=True)
        return None

    def _check_context(self, ask: Ensure, endpoint: Endpoint, reasons: tuple[str, ...]) -> None:
        """Raise `Refusal` if the endpoint has less context than requested."""
        listed = self._library.get(ask.model)
        train = listed.model.context_train if listed is not None else 0
        if endpoint.context < (min(ask.context, train) if train else ask.context):
            reason = f" ({'; '.join(reasons)})" if reasons else ""
            raise Refusal(
                Fault.UNAVAILABLE,
                f"{ask.model} stays loaded with {endpoint.context} tokens of context{reason}; "
                "unload it first to reload it",
                retry_after=10.0,
            )

    async def _keep_for(self, node: str, deployment: str, seconds: float) -> None:
        """Tell the head the keep_alive; it may have loaded the model for a caller with another one."""
        if node == self._view.me.node:
            self._keep(deployment, seconds)
            return
        try:
            order = KeepOrder(deployment, seconds)
            await self._calls.call(node, "keep", order, Done, timeout=DRAIN_CALL)
        except PeerError as error:
            message = f"loaded, but keep_alive could not be set: {error}"
            raise Refusal(Fault.UNAVAILABLE, message, retry_after=2.0) from None

    async def unload(self, model: str, *, force: bool) -> Dropped:
        """Unload ``model`` (a name or a deployment's id) and return what was unloaded.

        Raises:
            Refusal: NOT_FOUND; UNAVAILABLE while it serves requests, unless ``force``.
        """
        live = self._view.live()
        name = await self._loaded_name(model, live)
        drop = Drop(name, force=force, seen=loaded_of(live, name, name))
        dropped = await self._client.unload(drop)
        if dropped.refused:
            reasons = "; ".join(reason for _, reason in dropped.refused)
            raise Refusal(Fault.UNAVAILABLE, f"{reasons}; use --force to end them", retry_after=10.0)
        return dropped

    async def _loaded_name(self, model: str, live: Sequence[Record]) -> str:
        """Return the model or deployment to unload.

        Raises:
            Refusal: as `Library.named` does.
        """
        endpoints = [endpoint for record in live for endpoint in record.endpoints]
        if any(endpoint.id == model for endpoint in endpoints):
            return model
        try:
            return (await self._library.named(model)).model.name
        except Refusal:
            # A running model may have outlived its file, or the nodes that have it.
            running = resolve(model, {endpoint.model for endpoint in endpoints if endpoint.loaded}).name
            if not running:
                raise
            return running

    async def scan(self) -> tuple[ExternalWorker, ...]:
        """Find external llama.cpp workers on this node's LAN; takes several seconds."""
        return await self._scan()

    async def use_external(self, addresses: Sequence[str]) -> None:
        """Make the external workers that a request names known; those that no node lists are watched here.

        Raises:
            Refusal: BAD_REQUEST, with the reasons, when none of them can be used.
        """
        known = {worker.address: worker for record in self._view.live() for worker in record.plain}
        unknown = [address for address in dict.fromkeys(addresses) if address not in known]
        found = await self._name_external(unknown) if unknown else ()
        workers = [known[address] for address in addresses if address in known] + list(found)
        if workers and not any(worker.state in _USABLE for worker in workers):
            reasons = "; ".join(f"{w.address}: {w.reason or w.state.value}" for w in workers)
            raise bad_request(f"none of the external workers can be used: {reasons}")

    async def drain(self, node: str, *, on: bool) -> None:
        """Drain a node (id or name; empty: this one), or end its drain.

        Raises:
            Refusal: NOT_FOUND, UNAVAILABLE.
        """
        if not node:
            await self._drain(on)
            return
        found = node_named(self._view, node)
        try:
            await self._calls.call(found, "drain", DrainOrder(on), Done, timeout=DRAIN_CALL)
        except PeerError as error:
            raise Refusal(Fault.UNAVAILABLE, str(error), retry_after=2.0) from None

    async def scores(self, model: str) -> tuple[Scored, ...]:
        """Return the endpoints that the router would choose from for ``model`` now, the best first.

        Raises:
            Refusal: NOT_FOUND, AMBIGUOUS.
        """
        listed = await self._library.named(model)
        query = EndpointQuery(
            listed.model.name,
            frozenset((Engine.LLAMA, Engine.OLLAMA)),
            digest=listed.model.digest,
            in_ollama=listed.in_ollama,
            size=listed.model.size,
        )
        now = asyncio.get_running_loop().time()
        return tuple(
            Scored(choice.candidate.endpoint.id, choice.candidate.record.name, choice.score, choice.why)
            for choice in self._router.rank(self._view.live(), query, now)
            if choice.candidate.endpoint.state is State.READY
        )

    async def _on_drain(self, caller: str, order: DrainOrder) -> Done:
        await self._drain(order.on)
        return Done(True)

    async def _on_keep(self, caller: str, order: KeepOrder) -> Done:
        self._keep(order.deployment, order.keep_alive)
        return Done(True)

    async def _resolved(self, ask: Ensure) -> Ensure:
        """Return ``ask`` with the model resolved from the caller's name.

        Raises:
            Refusal: NOT_FOUND, AMBIGUOUS.
        """
        listed = await self._library.named(ask.model)
        name, digest = listed.model.name, listed.model.digest
        return replace(ask, model=name, digest=digest, in_ollama=listed.in_ollama)

    async def _with_drafter(self, ask: Ensure) -> Ensure:
        """Return ``ask`` with the canonical name of the draft model, if one is named.

        Raises:
            Refusal: as `Library.named` does, since a mistyped name would draft nothing.
        """
        if not names_drafter(ask.placement.speculation):
            return ask
        try:
            drafter = await self._library.named(ask.placement.speculation)
        except Refusal as refusal:
            raise Refusal(refusal.fault, f"invalid speculation: {refusal.message}") from None
        return replace(ask, placement=replace(ask.placement, speculation=drafter.model.name))


def _ignore_progress(waiting: Waiting) -> None:
    """Ignore the progress of a load; the record shows it."""
