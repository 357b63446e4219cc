"""Passes: how the command line on one member gives orders to another member over HTTP.

A daemon gives a caller of its own machine a random text that is good for some minutes. Another node that is
shown it asks that daemon over the port for nodes, where both prove that they are members, whether it gave it.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
import time
from collections.abc import Callable

from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_client import Calls
from sollold.cluster.net.rpc_server import Peers
from sollold.cluster.net.view import View
from sollold.facts import dataclass

PASS_SECONDS = 300.0
PREFIX = "member."
_PASS = re.compile(r"member\.([0-9a-f]{16})\.([0-9a-f]{64})")
_MOST = 1000
"""Passes given out, and answers remembered."""
_CALL_SECONDS = 3.0
_REFUSED_SECONDS = 5.0
"""Seconds for which a pass that was refused is not asked about again."""
_AT_ONCE = 4
"""Questions under way at a time: callers who make passes up may not keep the nodes busy."""


@dataclass(frozen=True, slots=True)
class PassRequest:
    """Peer method ``pass``: whether the node asked gave out the pass whose SHA-256 this is."""

    digest: str


@dataclass(frozen=True, slots=True)
class PassAnswer:
    """``seconds``: how long it is still good; 0: it is not."""

    seconds: float


class MemberPasses:
    """Gives passes out and checks those of other members."""

    def __init__(self, view: View, calls: Calls, clock: Callable[[], float] = time.monotonic) -> None:
        self._view = view
        self._calls = calls
        self._clock = clock
        self._given: dict[str, float] = {}
        """Digest of a pass of our own → when it ends."""
        self._known: dict[str, tuple[bool, float]] = {}
        """Digest of another's pass → whether it is good, and until when we need not ask again."""
        self._asking = asyncio.Semaphore(_AT_ONCE)

    def register(self, server: Peers) -> None:
        """Answer the peer method ``pass``."""
        server.method("pass", PassRequest, self._answer)

    def issue(self) -> str:
        """A new pass, good for `PASS_SECONDS` on every member."""
        now = self._clock()
        secret = f"{PREFIX}{self._view.me.node}.{secrets.token_hex(32)}"
        self._given = {digest: end for digest, end in self._given.items() if end > now}
        while len(self._given) >= _MOST:
            del self._given[next(iter(self._given))]
        self._given[_hash(secret)] = now + PASS_SECONDS
        return secret

    async def check(self, text: str) -> bool:
        """Whether ``text`` is a pass that a live member gave out, and still good. Asks that member once."""
        found = _PASS.fullmatch(text)
        if found is None:
            return False
        node, digest, now = found[1], _hash(text), self._clock()
        if node == self._view.me.node:
            return self._given.get(digest, 0.0) > now
        # Of one that was evicted meanwhile none is good any more, whatever it said before.
        if all(one.node != node for one in self._view.live()):
            return False
        good, until = self._known.get(digest, (False, 0.0))
        if now < until:
            return good
        async with self._asking:
            try:
                answer = await self._calls.call(
                    node, "pass", PassRequest(digest), PassAnswer, timeout=_CALL_SECONDS
                )
            except PeerError:
                return False
        seconds = min(answer.seconds, PASS_SECONDS)
        while len(self._known) >= _MOST:
            del self._known[next(iter(self._known))]
        self._known[digest] = (seconds > 0, self._clock() + (seconds if seconds > 0 else _REFUSED_SECONDS))
        return seconds > 0

    async def _answer(self, caller: str, request: PassRequest) -> PassAnswer:
        return PassAnswer(max(0.0, self._given.get(request.digest, 0.0) - self._clock()))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
