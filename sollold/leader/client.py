"""Asks the leader of the cluster from any node, following redirects and waiting while there is no leader."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TypeVar

from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_client import RpcClient
from sollold.cluster.net.view import View, next_change
from sollold.errors import Fault, Refusal, unloaded_by_force
from sollold.leader.messages import Drop, Dropped, Ensure, Ensured, Verdict

log = logging.getLogger("sollold.leader")

Answer = TypeVar("Answer")

CALL_TIMEOUT = 65.0
"""Timeout of one call to the leader, in seconds: it asks every owner in turn, or waits for an unload."""
RETRY_AFTER = 0.5
PLANNING_PAUSE = 0.2
MAX_FAILURES = 20
"""Consecutive failures of a reachable leader after which `LeaderClient.ensure` gives up."""
PATIENCE = 10.0
"""Seconds for which a command waits for a leader."""


class LeaderClient:
    """Asks the leader of the cluster, wherever it is."""

    def __init__(self, view: View, calls: RpcClient) -> None:
        self._view = view
        self._calls = calls

    async def ensure(self, ask: Ensure, on_wait: Callable[[str], None]) -> Ensured:
        """Ask until an endpoint serves the model (USE) or is being loaded for it (WAIT).

        There is no timeout; the caller must set one. ``on_wait`` is called with the reason for the wait.

        Raises:
            Refusal: the leader refuses, or fails `MAX_FAILURES` times in a row (UNAVAILABLE).
        """
        failures = 0
        began = asyncio.get_running_loop().time()
        last_message = ""

        def tell(message: str) -> None:
            nonlocal last_message
            last_message = message
            on_wait(message)

        redirected_to = ""
        while True:
            leader = redirected_to or self._view.leader().leader
            redirected_to = ""
            if not leader:
                tell("the cluster has no leader right now")
                await next_change(self._view, RETRY_AFTER)
                continue
            ask = replace(ask, waited=asyncio.get_running_loop().time() - began)
            try:
                answer = await self._calls.call(leader, "ensure", ask, Ensured, timeout=CALL_TIMEOUT)
            except PeerError as error:
                message = f"the leader could not be reached: {error}"
                if message != last_message:
                    log.warning("%s", message)
                tell(message)
                failures = 0 if error.transport else failures + 1
                if failures >= MAX_FAILURES:
                    raise Refusal(Fault.UNAVAILABLE, message, retry_after=10.0) from None
                await next_change(self._view, RETRY_AFTER)
                continue
            failures = 0
            match answer.verdict:
                case Verdict.USE | Verdict.WAIT:
                    return answer
                case Verdict.REFUSED if answer.fault == Fault.INTERRUPTED:
                    raise unloaded_by_force(ask.model)
                case Verdict.REFUSED:
                    raise Refusal(_fault(answer.fault), answer.message, retry_after=answer.retry_after)
                case Verdict.PLANNING:
                    if answer.message != last_message:
                        log.info("%s", answer.message)
                    tell(answer.message)
                    await asyncio.sleep(PLANNING_PAUSE)
                case Verdict.ELSEWHERE:
                    # A node with an outdated view may name a dead leader.
                    alive = {record.node for record in self._view.live()}
                    if answer.leader != leader and answer.leader in alive:
                        redirected_to = answer.leader
                    await next_change(self._view, PLANNING_PAUSE if redirected_to else RETRY_AFTER)

    async def unload(self, drop: Drop) -> Dropped:
        """Have a model unloaded.

        Raises:
            Refusal: UNAVAILABLE, the leader could not be reached.
        """

        async def attempt(named: str) -> Dropped:
            leader = named or self._view.leader().leader
            if not leader:
                raise NotYet("the cluster has no leader right now; try again")
            try:
                answer = await self._calls.call(leader, "drop", drop, Dropped, timeout=CALL_TIMEOUT)
            except PeerError as error:
                why = f"the leader could not be reached: {error}"
                if error.transport:
                    raise NotYet(why) from None
                raise Refusal(Fault.UNAVAILABLE, why, retry_after=2.0) from None
            if answer.leader not in ("", leader):
                raise NotYet("the leader has just changed; try again", answer.leader)
            return answer

        return await retry_until_accepted(self._view, attempt)


class NotYet(Exception):
    """A command was not accepted, since the leader is changing; ``leader``: the new one, if named."""

    def __init__(self, why: str, leader: str = "") -> None:
        super().__init__(why)
        self.leader = leader


async def retry_until_accepted(view: View, attempt: Callable[[str], Awaitable[Answer]]) -> Answer:
    """Send a command to the leader, retrying while the leader changes.

    ``attempt`` sends it once and raises `NotYet` if it was not accepted. Its argument is the leader that the
    last `NotYet` named, or an empty string.

    Raises:
        Refusal: UNAVAILABLE, no node accepted it within `PATIENCE`.
    """
    deadline = asyncio.get_running_loop().time() + PATIENCE
    named = ""
    while True:
        try:
            return await attempt(named)
        except NotYet as not_yet:
            if asyncio.get_running_loop().time() >= deadline:
                raise Refusal(Fault.UNAVAILABLE, str(not_yet), retry_after=2.0) from None
            named = not_yet.leader
        await next_change(view, PLANNING_PAUSE if named else RETRY_AFTER)


def _fault(word: str) -> Fault:
    try:
        return Fault(word)
    except ValueError:
        return Fault.UNAVAILABLE
