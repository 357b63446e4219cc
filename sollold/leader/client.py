"""Asking the leader of the cluster, from any node: follows redirects, waits while there is no leader."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TypeVar

from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_client import Calls
from sollold.cluster.net.view import View, next_change
from sollold.errors import Fault, Refusal, unloaded_by_force
from sollold.leader.messages import Drop, Dropped, Ensure, Ensured, Verdict

log = logging.getLogger("sollold.leader")

Answer = TypeVar("Answer")

CALL_TIMEOUT = 65.0
"""Seconds that the leader may take: it asks every owner in turn, or waits for an unload."""
RETRY_AFTER = 0.5
PLANNING_PAUSE = 0.2
MAX_FAILURES = 20
"""Times in a row that a leader may be reached and yet fail to answer."""
PATIENCE = 10.0
"""Seconds for which an order waits for a leader."""


class LeaderClient:
    """Asks the leader of the cluster, wherever it is."""

    def __init__(self, view: View, calls: Calls) -> None:
        self._view = view
        self._calls = calls

    async def ensure(self, ask: Ensure, on_wait: Callable[[str], None]) -> Ensured:
        """Ask until something answers for a model (USE) or is being loaded for it (WAIT).

        Asks for ever; the caller bounds the time. ``on_wait`` hears why it takes so long.

        Raises:
            Refusal: the leader refuses, or fails again and again (UNAVAILABLE).
        """
        failures = 0
        began = asyncio.get_running_loop().time()
        said = ""

        def tell(message: str) -> None:
            nonlocal said
            said = message
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
                message = f"the leader could not be asked: {error}"
                if message != said:
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
                    if answer.message != said:
                        log.info("%s", answer.message)
                    tell(answer.message)
                    await asyncio.sleep(PLANNING_PAUSE)
                case Verdict.ELSEWHERE:
                    # A node that has not heard yet may name one that is dead.
                    alive = {record.node for record in self._view.live()}
                    if answer.leader != leader and answer.leader in alive:
                        redirected_to = answer.leader
                    await next_change(self._view, PLANNING_PAUSE if redirected_to else RETRY_AFTER)

    async def unload(self, drop: Drop) -> Dropped:
        """Have a model unloaded.

        Raises:
            Refusal: UNAVAILABLE, the leader could not be asked.
        """

        async def attempt(named: str) -> Dropped:
            leader = named or self._view.leader().leader
            if not leader:
                raise NotYet("the cluster has no leader right now; try again")
            try:
                answer = await self._calls.call(leader, "drop", drop, Dropped, timeout=CALL_TIMEOUT)
            except PeerError as error:
                why = f"the leader could not be asked: {error}"
                if error.transport:
                    raise NotYet(why) from None
                raise Refusal(Fault.UNAVAILABLE, why, retry_after=2.0) from None
            if answer.leader not in ("", leader):
                raise NotYet("the leader has just changed; try again", answer.leader)
            return answer

        return await ask_until_taken(self._view, attempt)


class NotYet(Exception):
    """An order was not taken: another leader is coming, or has been named by the node that was asked."""

    def __init__(self, why: str, leader: str = "") -> None:
        super().__init__(why)
        self.leader = leader


async def ask_until_taken(view: View, attempt: Callable[[str], Awaitable[Answer]]) -> Answer:
    """Give an order to the leader, again and again while that changes.

    ``attempt`` gives it once, to the node that was named last where one was (else ""), and raises `NotYet`.

    Raises:
        Refusal: UNAVAILABLE, nobody took it for `PATIENCE`.
    """
    until = asyncio.get_running_loop().time() + PATIENCE
    named = ""
    while True:
        try:
            return await attempt(named)
        except NotYet as not_yet:
            if asyncio.get_running_loop().time() >= until:
                raise Refusal(Fault.UNAVAILABLE, str(not_yet), retry_after=2.0) from None
            named = not_yet.leader
        await next_change(view, PLANNING_PAUSE if named else RETRY_AFTER)


def _fault(word: str) -> Fault:
    try:
        return Fault(word)
    except ValueError:
        return Fault.UNAVAILABLE
