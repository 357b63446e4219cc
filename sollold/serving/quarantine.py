"""Requests after which an engine crashed: they are refused for a while, so that they crash no other. Pure."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import msgspec

from sollold.errors import Fault, Refusal
from sollold.serving.request import Ask
from sollold.units import seconds_text

PERIOD = 600.0
"""Seconds for which such a request is refused."""
_MOST = 256
"""Requests that are remembered."""
_VOLATILE = frozenset(("stream", "stream_options", "user", "keep_alive", "metadata", "options", "seed"))
"""Fields of a body in which a request that is sent again may differ."""


class Quarantine:
    """This node's memory of them, by a digest of what was asked."""

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
        raise refusal(f"it is refused for {seconds_text(until - now)} more")


def refusal(what_follows: str) -> Refusal:
    """Why such a request is not tried on another engine."""
    return Refusal(
        Fault.BAD_REQUEST,
        f"an engine crashed while it worked on this request, so no other is given it: {what_follows}. "
        "Something in it, such as a grammar, a schema or an image, makes the engine fail; change it",
        status=422,
    )


def _digest(ask: Ask) -> bytes:
    """Over the model and what is asked of it, whichever engine and however often."""
    bodies = [
        (engine, call.path, {key: value for key, value in call.body.items() if key not in _VOLATILE})
        for engine, call in sorted(ask.calls.items())
    ]
    model = ask.resolved.model.digest if ask.resolved is not None else ask.model
    return hashlib.blake2b(msgspec.json.encode((model, bodies), order="sorted"), digest_size=16).digest()
