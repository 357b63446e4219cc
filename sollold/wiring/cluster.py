"""The cluster as the dialects ask for it: the view, the leader's preview, loads, drains and the router."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from sollold.agent.commands import Done
from sollold.api.parts import PlanAsk, Planned, Scored
from sollold.cluster.peer import PeerCalls, PeerError, PeerServer
from sollold.cluster.record import Backend, Endpoint, Record, State
from sollold.cluster.term import Term
from sollold.cluster.view import View
from sollold.leader.ensure import Drop, Ensure, Verdict
from sollold.leader.leader import Leader
from sollold.leader.world import loaded_of
from sollold.machine.plain import PlainWorker
from sollold.models.library import Library, Listed
from sollold.serving.ask import Answer, Ask, Call, Engine, Fault, Refusal, Waiting, unresolved
from sollold.serving.loader import LeaderLoader, Need
from sollold.serving.router import Router, Wish
from sollold.wiring.nodes import node_named

DRAIN_CALL = 5.0


@dataclass(frozen=True, slots=True)
class DrainOrder:
    """Peer method ``drain``: take no new work, or take it again."""

    on: bool


@dataclass(frozen=True, slots=True)
class KeepOrder:
    """Peer method ``keep``: how long a deployment may be idle, in seconds; negative: for ever."""

    deployment: str
    keep_alive: float


class ClusterHere:
    """Fulfils `sollold.api.parts.Cluster`.

    Args:
        drain: empties this node of requests (True) or takes work again; returns when that has begun.
        keep: says of a deployment of this node how long it may be idle.
        scan: looks for workers that others started.
        serve: answers a request, as `sollold.serving.ask.Service.open`.
        limit: seconds that a load may take; it may be changed later.
    """

    def __init__(
        self,
        view: View,
        library: Library,
        calls: PeerCalls,
        leader: Leader,
        loader: LeaderLoader,
        router: Router,
        drain: Callable[[bool], Awaitable[None]],
        keep: Callable[[str, float], None],
        scan: Callable[[], Awaitable[tuple[PlainWorker, ...]]],
        serve: Callable[[Ask, Callable[[Waiting], None]], Awaitable[Answer]],
        limit: float,
    ) -> None:
        self._view = view
        self._library = library
        self._calls = calls
        self._leader = leader
        self._loader = loader
        self._router = router
        self._drain = drain
        self._keep = keep
        self._scan = scan
        self._serve = serve
        self.limit = limit

    def register(self, server: PeerServer) -> None:
        """Answer the peer calls ``drain`` and ``keep``."""
        server.method("drain", DrainOrder, self._on_drain)
        server.method("keep", KeepOrder, self._on_keep)

    @property
    def me(self) -> Record:
        """This node's own record."""
        return self._view.me

    def live(self) -> tuple[Record, ...]:
        """The nodes that are alive, this one included."""
        return self._view.live()

    def leader(self) -> Term:
        """Who plans at present."""
        return self._view.leader()

    async def plan(self, ask: PlanAsk) -> Planned:
        """What a load would do, without doing it.

        Raises:
            Refusal: NOT_FOUND, AMBIGUOUS.
        """
        try:
            ensure = await self._ensure(ask)
        except Refusal as refusal:
            foreseen = self._leader.foresee(ask.model) if refusal.fault is Fault.NOT_FOUND else None
            if foreseen is None:
                raise
            return Planned(foreseen.ok, foreseen.message, msgspec.to_builtins(foreseen))
        preview = await self._leader.preview(ensure)
        return Planned(preview.ok, preview.message, msgspec.to_builtins(preview))

    async def load(self, ask: PlanAsk) -> tuple[Record, Endpoint]:
        """Load a model and wait until it can answer.

        Raises:
            Refusal: NOT_FOUND, AMBIGUOUS, TOO_BIG with the arithmetic, UNAVAILABLE, TIMEOUT, ENGINE.
        """
        ensure = await self._ensure(ask)
        loop = asyncio.get_running_loop()
        limit = self.limit
        end = loop.time() + limit
        answer = await self._leader.ensure(ensure)
        while answer.verdict in (Verdict.PLANNING, Verdict.ELSEWHERE) and loop.time() < end:
            await asyncio.sleep(0.2)
            answer = await self._leader.ensure(ensure)
        if answer.verdict is Verdict.REFUSED:
            raise Refusal(Fault(answer.fault), answer.message, retry_after=answer.retry_after)
        wish = Wish(
            ensure.model,
            frozenset((Engine.LLAMA, Engine.OLLAMA)),
            context=ask.context,
            embedding=ask.embedding,
            digest=ensure.digest,
            in_ollama=ensure.in_ollama,
        )
        while True:
            left = max(0.0, end - loop.time())
            need = Need(wish, ask.keep_alive, left, waited=limit - left)
            ready = await self._loader.ready(need, _unheard)
            found = self._view.record(ready.node) if ready is not None else None
            if ready is not None and found is not None:
                break
            await asyncio.sleep(0.1)
        endpoint = ready.endpoint
        if endpoint.backend is Backend.OLLAMA:
            # One that only embeds refuses the word that loads; with 0 the word would unload.
            if endpoint.embedding or ask.keep_alive == 0 or (endpoint.loaded and ask.keep_alive is None):
                return found, endpoint
            return await self._load_in_ollama(ensure, max(1.0, end - loop.time())) or (found, endpoint)
        self._check_context(ensure, endpoint, answer.reasons)
        if ask.keep_alive is not None:
            await self._keep_for(ready.node, endpoint.id, ask.keep_alive)
        return found, endpoint

    async def _load_in_ollama(self, ensure: Ensure, limit: float) -> tuple[Record, Endpoint] | None:
        """Have an Ollama load it, and keep it as long as named: until it is asked it only could.

        Answers where, as far as the records tell.
        """
        body: dict[str, Any] = {"model": ensure.model, "stream": False}
        if ensure.keep_alive is not None:
            body["keep_alive"] = ensure.keep_alive
        if ensure.context:
            body["options"] = {"num_ctx": ensure.context}
        answer = await self._serve(
            Ask(
                id=f"load-{secrets.token_hex(6)}",
                model=ensure.model,
                calls={Engine.OLLAMA: Call("/api/generate", body)},
                stream=False,
                load_only=True,
                context=ensure.context,
                keep_alive=ensure.keep_alive,
                deadline=limit,
            ),
            _unheard,
        )
        async for _ in answer.events:
            pass
        for record in self._view.live():
            for endpoint in record.endpoints if record.name == answer.routing.node else ():
                if endpoint.backend is Backend.OLLAMA and endpoint.is_of(
                    ensure.model, ensure.digest, ensure.in_ollama
                ):
                    return record, replace(endpoint, loaded=True)
        return None

    def _check_context(self, ensure: Ensure, endpoint: Endpoint, reasons: tuple[str, ...]) -> None:
        """Raises `Refusal` when what is loaded has less context than was named."""
        listed = self._library.get(ensure.model)
        train = listed.model.context_train if listed is not None else 0
        if endpoint.context < (min(ensure.context, train) if train else ensure.context):
            why = f" ({'; '.join(reasons)})" if reasons else ""
            raise Refusal(
                Fault.UNAVAILABLE,
                f"{ensure.model} stays loaded with {endpoint.context} tokens of context{why}; "
                "unload it first to load it anew",
                retry_after=10.0,
            )

    async def _keep_for(self, node: str, deployment: str, seconds: float) -> None:
        """Tell the head, which may have loaded it for another caller with other seconds."""
        if node == self._view.me.node:
            self._keep(deployment, seconds)
            return
        try:
            order = KeepOrder(deployment, seconds)
            await self._calls.call(node, "keep", order, Done, timeout=DRAIN_CALL)
        except PeerError as error:
            why = f"it is loaded, but how long it is kept could not be set: {error}"
            raise Refusal(Fault.UNAVAILABLE, why, retry_after=2.0) from None

    async def unload(self, model: str, *, force: bool) -> int:
        """End what is loaded of ``model`` (a name or a deployment's id) and say how many were.

        Raises:
            Refusal: NOT_FOUND; UNAVAILABLE while requests are in it and not ``force``.
        """
        live = self._view.live()
        loaded = {endpoint.id for record in live for endpoint in record.endpoints}
        if model in loaded:
            name, digest = model, ""
        else:
            meant = (await self._meant(model)).model
            name, digest = meant.name, meant.digest
        drop = Drop(name, digest, force=force, seen=loaded_of(live, name, name, digest))
        try:
            dropped = await self._leader.drop(drop)
        except PeerError as error:
            raise Refusal(Fault.UNAVAILABLE, str(error), retry_after=2.0) from None
        if dropped.refused:
            why = "; ".join(reason for _, reason in dropped.refused)
            raise Refusal(Fault.UNAVAILABLE, f"{why}; --force ends them", retry_after=10.0)
        return len(dropped.ended)

    async def scan(self) -> tuple[PlainWorker, ...]:
        """As `sollold.api.parts.Cluster.scan`."""
        return await self._scan()

    async def drain(self, node: str, *, on: bool) -> None:
        """Take a node (id or name; empty: this one) out of new work, or back.

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
        """What the router would choose from for ``model`` now, the best first.

        Raises:
            Refusal: NOT_FOUND, AMBIGUOUS.
        """
        meant = await self._meant(model)
        wish = Wish(
            meant.model.name,
            frozenset((Engine.LLAMA, Engine.OLLAMA)),
            digest=meant.model.digest,
            in_ollama=meant.in_ollama,
            size=meant.model.size,
        )
        now = asyncio.get_running_loop().time()
        return tuple(
            Scored(choice.candidate.endpoint.id, choice.candidate.record.name, choice.score, choice.why)
            for choice in self._router.rank(self._view.live(), wish, now)
            if choice.candidate.endpoint.state is State.READY
        )

    async def _on_drain(self, caller: str, order: DrainOrder) -> Done:
        await self._drain(order.on)
        return Done(True)

    async def _on_keep(self, caller: str, order: KeepOrder) -> Done:
        self._keep(order.deployment, order.keep_alive)
        return Done(True)

    async def _ensure(self, ask: PlanAsk) -> Ensure:
        meant = await self._meant(ask.model)
        return Ensure(
            meant.model.name,
            meant.model.digest,
            in_ollama=meant.in_ollama,
            context=ask.context,
            keep_alive=ask.keep_alive,
            embedding=ask.embedding,
            slots=ask.slots,
            type_k=ask.type_k,
            type_v=ask.type_v,
            policy=ask.policy,
            fixed=ask.layers,
        )

    async def _meant(self, model: str) -> Listed:
        resolved = await self._library.awaited(model)
        listed = self._library.get(model)
        if listed is None:
            raise unresolved(resolved)
        return listed


def _unheard(waiting: Waiting) -> None:
    """Nobody watches this load's progress; the record shows it."""
