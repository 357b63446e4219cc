"""Carries out a placement: evict, reserve on all nodes or none, then send the plan to the head."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Iterable

from sollold.cluster.gossip.record import OLLAMA_PREFIX
from sollold.cluster.gossip.term import Term
from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_client import RpcClient
from sollold.cluster.net.view import View, name_of, wait_until
from sollold.engines.commands import Deploy, Done, Fetch, Fetched, Release, Reserve, Reserved, Unload
from sollold.leader.decision import Place
from sollold.leader.messages import Drop, Dropped
from sollold.leader.observations import Observations
from sollold.leader.pending import PendingFetch
from sollold.leader.snapshot import AcceptedDeployment

log = logging.getLogger("sollold.leader")

CALL_TIMEOUT = 5.0
UNLOAD_TIMEOUT = 60.0
FREED_WITHIN = 3.0
"""Seconds within which the records should show freed memory."""


class StaleError(Exception):
    """This node no longer leads."""


class PlanApplier:
    """Sends the leader's commands to owners and heads, and reports the results to ``observations``."""

    def __init__(
        self, view: View, calls: RpcClient, observations: Observations, clock: Callable[[], float]
    ) -> None:
        self._view = view
        self._calls = calls
        self._observations = observations
        self._clock = clock

    async def apply(self, place: Place, keep_alive: float, term: Term, excluded: dict[str, str]) -> str:
        """Carry out one plan. Return the deployment's id, or an empty string when it must be planned again.

        Nodes that must take no part in the next plan are added to ``excluded``, with the reason.

        Raises:
            StaleError: another node leads.
        """
        if not await self._evict(place, term):
            return ""
        plan = place.plan
        deployment = f"{_slug(plan.model)}-{secrets.token_hex(4)}"
        owners = sorted(plan.bytes_by_owner().items())
        reserved: list[str] = []
        try:
            for node, wanted in owners:
                reserved.append(node)
                if not await self._reserve(deployment, plan.head, node, wanted, term, excluded):
                    await self._release(deployment, plan.head, reserved, term)
                    return ""
            self._check(term)
            done = await self._deploy(deployment, place, keep_alive, term)
        except (StaleError, asyncio.CancelledError):
            await self._release(deployment, plan.head, reserved, term)
            raise
        if not done.ok:
            excluded[plan.head] = done.reason
            await self._release(deployment, plan.head, reserved, term)
            return ""
        held = {(node, device): size for node, wanted in owners for device, size in wanted.items()}
        self._observations.note_accepted(AcceptedDeployment(deployment, plan, held), self._clock())
        log.info(
            "%s goes to %s: %s",
            plan.model,
            name_of(self._view, plan.head),
            " ".join(plan.reasons),
            extra={"deployment": deployment},
        )
        return deployment

    async def _reserve(
        self,
        deployment: str,
        head: str,
        node: str,
        wanted: dict[str, int],
        term: Term,
        excluded: dict[str, str],
    ) -> bool:
        self._check(term)
        request = Reserve(term, deployment, head, wanted)
        try:
            answer = await self._calls.call(node, "reserve", request, Reserved, timeout=CALL_TIMEOUT)
        except PeerError as error:
            excluded[node] = f"it could not be reached to reserve memory ({error})"
            self._observations.unreachable(node, str(error), self._clock())
            return False
        if answer.ok:
            return True
        log.info("%s refused %s: %s", name_of(self._view, node), deployment, answer.reason)
        available = answer.available or {}
        short = any(size > available.get(device, 0) for device, size in wanted.items() if size)
        fits_each = bool(available) and not short and len(wanted) > 1
        if available and (short or fits_each):
            self._observations.told(node, available, wanted, self._clock())
        else:
            # Memory is not the reason: the node is draining, is cleaning up, or knows a newer leader.
            excluded[node] = answer.reason
        return False

    async def _deploy(self, deployment: str, place: Place, keep_alive: float, term: Term) -> Done:
        head, request = place.plan.head, Deploy(term, deployment, place.plan, keep_alive)
        try:
            done = await self._calls.call(head, "deploy", request, Done, timeout=CALL_TIMEOUT * 2)
            if not done.ok:
                self._observations.nodes.failed(head, done.reason, self._clock())
            return done
        except PeerError as error:
            # The request may have arrived: the release that follows ends whatever it started.
            self._observations.unreachable(head, str(error), self._clock())
            return Done(False, f"it could not be reached to load the model ({error})")

    async def stop_fetch(self, fetch: PendingFetch) -> None:
        """Have a node stop a fetch. A node that can't be reached soon stops it by itself."""
        order = Fetch(self._view.leader(), fetch.model, fetch.digest, stop=True)
        with contextlib.suppress(PeerError):
            await self._calls.call(fetch.node, "fetch", order, Fetched, timeout=CALL_TIMEOUT)

    async def release_orphans(self, orphans: Iterable[tuple[str, str, str]], term: Term) -> None:
        """Release the grants that dead heads left behind, given as (node, deployment, head)."""
        await asyncio.gather(
            *(self._release(deployment, head, [node], term) for node, deployment, head in orphans)
        )

    async def _release(self, deployment: str, head: str, nodes: Iterable[str], term: Term) -> None:
        async def release(node: str) -> None:
            with contextlib.suppress(PeerError):
                request = Release(term, deployment, head)
                await self._calls.call(node, "release", request, Done, timeout=CALL_TIMEOUT)

        await asyncio.gather(*(release(node) for node in nodes))

    async def unload(self, node: str, deployment: str, term: Term, reason: str, *, force: bool) -> Done:
        """Have a head end a deployment and free its memory; not ok if the head can't be reached."""
        request = Unload(term, deployment, force, reason)
        try:
            done = await self._calls.call(node, "unload", request, Done, timeout=UNLOAD_TIMEOUT)
        except PeerError as error:
            return Done(False, str(error))
        if done.ok and not deployment.startswith(OLLAMA_PREFIX):
            self._observations.ended(deployment, self._clock())
        return done

    async def tell_others(self, drop: Drop) -> None:
        """Tell the other nodes, any of which may lead next, not to reload a lost model."""
        others = [record.node for record in self._view.live() if record.node != self._view.me.node]

        async def send(node: str) -> None:
            with contextlib.suppress(PeerError):
                await self._calls.call(node, "drop", drop, Dropped, timeout=CALL_TIMEOUT)

        await asyncio.gather(*map(send, others))

    async def end_when_idle(self, node: str, deployment: str, term: Term, reason: str) -> None:
        """Have a head admit no new requests to a deployment, and end it when it is idle."""
        with contextlib.suppress(PeerError):
            request = Unload(term, deployment, reason=reason, when_idle=True)
            await self._calls.call(node, "unload", request, Done, timeout=CALL_TIMEOUT)

    async def _evict(self, place: Place, term: Term) -> bool:
        """End idle deployments and wait until the records show their memory free. False if one refused."""
        if not place.evictions:
            return True
        self._check(term)
        reason = f"makes room for {place.plan.model}"

        async def unload(node: str, deployment: str, model: str) -> bool:
            done = await self.unload(node, deployment, term, reason, force=False)
            words = reason if done.ok else f"was not unloaded: {done.reason}"
            log.info("%s %s", model, words, extra={"deployment": deployment})
            if not done.ok:
                self._observations.unwilling(deployment, self._clock())
            return done.ok

        ended = await asyncio.gather(*(unload(*victim) for victim in place.evictions))
        if not all(ended):
            return False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FREED_WITHIN):
                await self._until_free({deployment for _, deployment, _ in place.evictions})
        return True

    async def _until_free(self, deployments: set[str]) -> None:
        """Wait until no record shows a grant of these deployments."""
        await wait_until(
            self._view,
            lambda: not any(g.deployment in deployments for r in self._view.live() for g in r.grants),
        )

    def _check(self, term: Term) -> None:
        if self._view.leader() != term or term.leader != self._view.me.node:
            raise StaleError


def _slug(name: str) -> str:
    kept = "".join(c if c.isalnum() else "-" for c in name.rsplit("/", 1)[-1].lower())
    return kept.strip("-")[:32] or "model"
