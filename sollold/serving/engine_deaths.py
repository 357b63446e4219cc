"""Requests over which engines end: noticed while one is answered, and then refused for a while on this node.

An engine that crashes with a request in it shows that at once; of one that only ended it takes several, one
after the other.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import OrderedDict
from typing import Any

import msgspec

from sollold.cluster.net.view import View
from sollold.errors import Fault, Refusal
from sollold.facts import dataclass
from sollold.serving.protocol import StreamError
from sollold.serving.request import Ask, Engine
from sollold.units import seconds_text

log = logging.getLogger("sollold.serving")

PERIOD = 600.0
"""Seconds for which such a request is refused."""
FRUITLESS = 3
"""Engines that may end after the first, one after the other, with a request in them."""
FRUITLESS_EMBEDDING = 2
"""The same for embeddings: they are short, so engines that die over one die of it."""
_MOST = 256
"""Requests that are remembered."""
_VOLATILE = frozenset(("stream", "stream_options", "user", "keep_alive", "metadata", "seed"))
"""Fields of a body, and of its options, in which a request that is sent again may differ."""


class Quarantine:
    """This node's memory of requests after which an engine crashed, by a digest of what was asked."""

    def __init__(self) -> None:
        self._until: OrderedDict[bytes, float] = OrderedDict()

    def add(self, ask: Ask, now: float) -> None:
        """An engine crashed with ``ask`` in it."""
        digest = _digest(ask)
        self._until[digest] = now + PERIOD
        self._until.move_to_end(digest)
        if len(self._until) > _MOST:
            self._until.popitem(last=False)

    def check(self, ask: Ask, now: float) -> None:
        """Refuse what crashed an engine a short time ago.

        Raises:
            Refusal: BAD_REQUEST with status 422.
        """
        if not self._until:
            return
        digest = _digest(ask)
        until = self._until.get(digest)
        if until is None:
            return
        if now >= until:
            del self._until[digest]
            return
        raise _crashed_refusal(f"it is refused for {seconds_text(until - now)} more")


def _crashed_refusal(what_follows: str) -> Refusal:
    """Why such a request is not tried on another engine."""
    return Refusal(
        Fault.BAD_REQUEST,
        f"an engine crashed while it worked on this request, so no other is given it: {what_follows}. "
        "Something in it, such as a grammar, an option or an image, makes the engine fail; change it",
        status=422,
    )


def _digest(ask: Ask) -> bytes:
    """Over the model and what is asked of it, whichever engine and however often."""
    bodies: list[tuple[Engine, str, dict[str, Any]]] = []
    for engine, call in sorted(ask.calls.items()):
        body = {key: value for key, value in call.body.items() if key not in _VOLATILE}
        if isinstance(options := body.get("options"), dict):
            body["options"] = {key: value for key, value in options.items() if key not in _VOLATILE}
        bodies.append((engine, call.path, body))
    model = ask.resolved.model.digest if ask.resolved is not None else ask.model
    return hashlib.blake2b(msgspec.json.encode((model, bodies), order="sorted"), digest_size=16).digest()


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
            raise _crashed_refusal(f"it is refused for {seconds_text(PERIOD)}")
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
