"""A `Service` that retries a request that an engine refused, in a revised form."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from msgspec.structs import replace

from sollold.errors import Fault, Refusal
from sollold.serving.request import Answer, Ask, Engine, Service, Waiting


def end_of(ask: Ask) -> float:
    """Return when the deadline of a request that begins now passes, in monotonic time; 0.0 for none."""
    return time.monotonic() + ask.deadline if ask.deadline > 0 else 0.0


def ending(ask: Ask, end: float) -> Ask:
    """Return ``ask`` for another try, with the time left until ``end`` as its deadline; 0.0: it has none."""
    return replace(ask, deadline=max(0.001, end - time.monotonic())) if end else ask


def with_llama_body(ask: Ask, changes: Mapping[str, Any]) -> Ask:
    """Return ``ask`` with ``changes`` in the body of its call to llama-server, which it must have."""
    call = ask.calls[Engine.LLAMA]
    return replace(ask, calls={**ask.calls, Engine.LLAMA: replace(call, body={**call.body, **changes})})


class RevisingService:
    """Base of the services that retry a refused request as revised by `_revised`, at most ``tries`` times."""

    tries = 3

    def __init__(self, service: Service) -> None:
        self.service = service
        self._innermost: Service = service._innermost if isinstance(service, RevisingService) else service
        """Gets each request first; most need no other try, whatever the number of services around it."""

    async def open(self, ask: Ask, on_wait: Callable[[Waiting], None]) -> Answer:
        """As `Service.open`; the deadline of ``ask`` covers all tries together.

        Raises:
            Refusal: also if the request can't be revised any further.
        """
        end = end_of(ask)
        try:
            return await self._innermost.open(ask, on_wait)
        except Refusal as first:
            refusal = first
        return await self._retry(ask, on_wait, refusal, end)

    async def _retry(
        self, first: Ask, on_wait: Callable[[Waiting], None], refusal: Refusal, end: float
    ) -> Answer:
        """Retry ``first``, which was refused, in forms revised by the services within, then by this one.

        ``end``: from `end_of`.
        """
        if isinstance(self.service, RevisingService):
            try:
                return await self.service._retry(first, on_wait, refusal, end)
            except Refusal as last:
                refusal = last
        ask = ending(first, end)
        for attempt in range(self.tries):
            by_engine = refusal.fault in (Fault.ENGINE, Fault.BAD_REQUEST)
            revised = await self._revised(ask, refusal, attempt) if by_engine else None
            if revised is None:
                break
            ask = ending(revised, end)
            try:
                answer = await self.service.open(ask, on_wait)
            except Refusal as next_refusal:
                refusal = next_refusal
                continue
            if ask.calls is not first.calls:
                answer.routing.warnings += self._warnings(first, ask)
            return answer
        raise self._final(refusal) from None

    async def _revised(self, ask: Ask, refusal: Refusal, attempt: int) -> Ask | None:
        """Return a revised form of the refused request; None if there is none."""
        raise NotImplementedError

    def _final(self, refusal: Refusal) -> Refusal:
        """Return the refusal for the caller."""
        return refusal

    def _warnings(self, first: Ask, last: Ask) -> tuple[str, ...]:
        """Return warnings for the caller about the change from ``first`` to ``last``."""
        return ()
