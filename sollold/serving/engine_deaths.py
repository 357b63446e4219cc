"""Detects requests that make engines die, and stops trying them on more engines.

A crash while the engine had no other request without an answer is proof at once: this node then refuses the
same request for a while. If there were several, each is a suspect, and they are tried again one at a time,
all in the same other engine, the likeliest cause last (`sollold.serving.suspects`). So the cause crashes at
most one more engine, and none if it was the likeliest one. If engines only ended, it takes several in a row
until the request fails; an equal one, perhaps after a change of the settings, then gets only one.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from typing import Any

import msgspec

from sollold.bounded import BoundedDict
from sollold.cluster.net.view import View, endpoint_at
from sollold.engines.llamacpp.exit_reason import lacked_memory
from sollold.errors import Fault, Refusal, bad_request
from sollold.facts import dataclass
from sollold.serving.protocol import StreamError, Trial
from sollold.serving.request import Ask, Engine
from sollold.units import seconds_text

log = logging.getLogger("sollold.serving")

PERIOD = 600.0
"""Seconds for which a request that crashed an engine is refused, or one that failed gets only one engine."""
_MAX_RETRIES = 3
"""Further attempts allowed after an engine ended with the request."""
_MAX_EMBEDDING_RETRIES = 2
"""The same for embeddings, which are short: an engine that dies with one probably dies of it."""
_MAX_REQUESTS = 256
"""Maximum number of remembered requests."""
_VOLATILE = frozenset(("stream", "stream_options", "user", "keep_alive", "metadata", "seed"))
"""Fields of a body and of its options that are ignored when comparing requests."""


class Quarantine:
    """This node's memory of requests that crashed an engine, or failed with several, by digest."""

    def __init__(self) -> None:
        self._until: BoundedDict[bytes, float] = BoundedDict(_MAX_REQUESTS)
        self._failed_until: BoundedDict[bytes, float] = BoundedDict(_MAX_REQUESTS)

    def add(self, ask: Ask, now: float) -> None:
        """Remember a request that crashed an engine."""
        self._until[_digest(ask)] = now + PERIOD

    def add_failed(self, ask: Ask, now: float) -> None:
        """Remember a request with which several engines ended."""
        self._failed_until[_digest(ask)] = now + PERIOD

    def has_failed(self, ask: Ask, now: float) -> bool:
        """Return whether several engines ended with the request within the last `PERIOD`."""
        return bool(self._failed_until) and now < self._failed_until.get(_digest(ask), 0.0)

    def check(self, ask: Ask, now: float) -> None:
        """Refuse a request that crashed an engine within the last `PERIOD`.

        Raises:
            Refusal: BAD_REQUEST with status 422.
        """
        if not self._until:
            return
        digest = _digest(ask)
        expiry = self._until.get(digest)
        if expiry is None:
            return
        if now >= expiry:
            del self._until[digest]
            return
        raise _crashed_refusal(f"it is refused for {seconds_text(expiry - now)} more")


def _crashed_refusal(consequence: str) -> Refusal:
    """The error for a request that crashed an engine; it is not tried on others."""
    return bad_request(
        f"an engine crashed while processing this request, so it is not sent to another one: {consequence}. "
        "Something in it, such as a grammar, an option or an image, makes engines crash; change it",
        status=422,
    )


def _digest(ask: Ask) -> bytes:
    """Return a digest of the model and the request's bodies, without the volatile fields."""
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
    """An engine that ended with the request. ``counts``: the request may have been the cause."""

    endpoint: tuple[str, str]
    why: str
    counts: bool


class EngineDeaths:
    """The engines that died with one request.

    Attributes:
        suspect: whether an engine crashed with this and other requests, none of them answered.
        trial: the same, if known which other requests these are.
    """

    def __init__(self, ask: Ask, quarantine: Quarantine, view: View) -> None:
        self._ask = ask
        self._quarantine = quarantine
        self._view = view
        self.suspect = False
        self.trial: Trial | None = None
        self._deaths: list[_Death] = []
        """Deaths since the last delivery of events."""
        self._crashed_engine = False
        """Whether the request crashed an engine."""

    def add(self, endpoint: tuple[str, str], error: StreamError) -> None:
        """Add an attempt at ``endpoint`` that ended with ``error``."""
        if error.crashed:
            self.add_crash(error.message)
        self.suspect |= error.suspect
        self.trial = error.trial or self.trial
        if error.taken:
            # A stream would have delivered an event if all had been well. Otherwise only a crash or a lack of
            # memory counts.
            counts = self._ask.stream or self._ask.embedding or lacked_memory(error.message)
            self._deaths.append(_Death(endpoint, str(error), counts=counts))

    def add_crash(self, reason: str) -> None:
        """Note that an engine crashed while it processed the request, and quarantine the request."""
        self._crashed_engine = True
        self._quarantine.add(self._ask, asyncio.get_running_loop().time())
        log.warning("the request crashed an engine: %s", reason, extra={"request": self._ask.id})

    def delivered(self) -> None:
        """Note that events were delivered, so that earlier deaths no longer count against the request."""
        self._deaths.clear()
        self.suspect, self.trial = False, None

    def check(self) -> None:
        """Refuse the request if it (or an equal one) crashed an engine, or if too many engines ended with it.

        Raises:
            Refusal: BAD_REQUEST, INTERRUPTED.
        """
        if self._crashed_engine:
            raise _crashed_refusal(f"it is refused for {seconds_text(PERIOD)}")
        now = asyncio.get_running_loop().time()
        self._quarantine.check(self._ask, now)
        if not self._deaths:
            return
        for death in self._deaths:
            death.counts = death.counts or self._failed(death.endpoint)
        counted = [death for death in self._deaths if death.counts]
        if not counted:
            return
        retries = _MAX_EMBEDDING_RETRIES if self._ask.embedding else _MAX_RETRIES
        if len(counted) > (0 if self._quarantine.has_failed(self._ask, now) else retries):
            self._quarantine.add_failed(self._ask, now)
            why = counted[-1].why
            advice = "Something in the request may make them fail; change the request"
            if lacked_memory(why):
                advice = (
                    "The request may need more memory than these engines have; shorten it, or load the model "
                    "for fewer requests or a smaller context"
                )
            failed = "an engine failed with this request again"
            if len(counted) > 1:
                failed = f"{len(counted)} engines failed one after another with this request, last"
            raise Refusal(Fault.INTERRUPTED, f"{failed}: {why}. {advice}", final=True)

    def _failed(self, endpoint: tuple[str, str]) -> bool:
        """Whether, according to the current record, a process of the endpoint crashed or lacked memory."""
        entry = endpoint_at(self._view, *endpoint)
        return entry is not None and (entry.crashed or lacked_memory(entry.reason))
