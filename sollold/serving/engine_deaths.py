"""Engines that ended with one request in them: after a few it is given to no further one."""

from __future__ import annotations

import asyncio
import logging

from sollold.cluster.net.view import View
from sollold.errors import Fault, Refusal
from sollold.facts import dataclass
from sollold.serving.protocol import StreamError
from sollold.serving.quarantine import PERIOD, Quarantine
from sollold.serving.quarantine import refusal as crash_refusal
from sollold.serving.request import Ask
from sollold.units import seconds_text

log = logging.getLogger("sollold.serving")

FRUITLESS = 3
"""Engines that may end after the first, one after the other, with a request in them."""
FRUITLESS_EMBEDDING = 2
"""The same for embeddings: they are short, so engines that die over one die of it."""


@dataclass(slots=True)
class _Death:
    """An engine that ended with the request in it. ``counts``: it may have been the request's doing."""

    endpoint: tuple[str, str]
    why: str
    counts: bool


class EngineDeaths:
    """Those of one request."""

    def __init__(self, ask: Ask, quarantine: Quarantine, view: View) -> None:
        self._ask = ask
        self._quarantine = quarantine
        self._view = view
        self._deaths: list[_Death] = []
        """Since anything was last delivered."""
        self._killer = False
        """An engine crashed over the request."""

    def add(self, endpoint: tuple[str, str], error: StreamError) -> None:
        """An attempt at ``endpoint`` ended with ``error``."""
        if error.crashed:
            self.add_crash(error.message)
        if error.taken:
            # Of a stream an event would have come, had all been well. Else only a crash is a sign.
            shows = self._ask.stream or self._ask.embedding
            self._deaths.append(_Death(endpoint, str(error), counts=shows))

    def add_crash(self, why: str) -> None:
        """An engine crashed while it worked on the request."""
        self._killer = True
        self._quarantine.add(self._ask, asyncio.get_running_loop().time())
        log.warning("the request crashed an engine: %s", why, extra={"request": self._ask.id})

    def delivered(self) -> None:
        """The caller got something: what failed before is no sign against the request."""
        self._deaths.clear()

    def check(self) -> None:
        """Refuse a request that has crashed an engine, or has ended one after the other.

        Raises:
            Refusal: BAD_REQUEST, INTERRUPTED.
        """
        if self._killer:
            raise crash_refusal(f"it is refused for {seconds_text(PERIOD)}")
        for death in self._deaths:
            death.counts = death.counts or self._crashed(death.endpoint)
        counted = [death for death in self._deaths if death.counts]
        if len(counted) > (FRUITLESS_EMBEDDING if self._ask.embedding else FRUITLESS):
            raise Refusal(
                Fault.INTERRUPTED,
                f"{len(counted)} engines crashed one after another with this request, last: "
                f"{counted[-1].why}. Something in the request may crash them; change the request",
            )

    def _crashed(self, endpoint: tuple[str, str]) -> bool:
        """Whether a process of the endpoint ended by a fault of its own, as its record says by now."""
        record = self._view.record(endpoint[0])
        return record is not None and any(one.id == endpoint[1] and one.crashed for one in record.endpoints)
