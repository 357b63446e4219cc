"""Passes: tokens with which the command line on one member authenticates to another member over HTTP.

A daemon gives a caller on its own machine a random token, valid for a few minutes at one other member. That
member asks the daemon, on the port for nodes where both prove their membership, whether it issued the token
and for whom. So a token is worthless to a machine that only poses as a member, and to a member that tries it
on another. It is sent over TLS: whoever reads it could use it at the other member.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
import time
from collections.abc import Callable
from typing import Annotated

from msgspec import Meta

from sollold.bounded import BoundedDict
from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_client import RpcClient
from sollold.cluster.net.rpc_server import RpcServer
from sollold.cluster.net.seeds import Seed, resolve
from sollold.cluster.net.view import View
from sollold.errors import Fault, Refusal
from sollold.facts import dataclass

PASS_SECONDS = 300.0
PREFIX = "member."
_PASS = re.compile(r"member\.([0-9a-f]{16})\.([0-9a-f]{64})")
_MAX_PASSES = 1000
"""Maximum number of issued passes, and of remembered replies."""
_CALL_SECONDS = 3.0
_REFUSED_SECONDS = 5.0
"""Seconds for which a refused pass is not checked again."""
_MAX_CHECKS = 4
"""Maximum number of concurrent checks, so that callers with invented passes can't keep the nodes busy."""


@dataclass(frozen=True, slots=True)
class PassRequest:
    """Peer method ``pass``: ask whether the node issued the pass with this SHA-256 for the caller."""

    digest: Annotated[str, Meta(max_length=64)]


@dataclass(frozen=True, slots=True)
class PassAnswer:
    """``seconds``: how long the pass remains valid; 0: it is not."""

    seconds: float


class MemberPasses:
    """Issues passes and checks those of other members.

    Attributes:
        authority: returns the CA certificate in PEM by which a member's HTTP port is recognized. In an open
            cluster it proves nothing: there any machine may become a member.
    """

    def __init__(
        self,
        view: View,
        calls: RpcClient,
        authority: Callable[[], str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.authority = authority
        self._view = view
        self._calls = calls
        self._clock = clock
        self._issued: dict[str, tuple[float, frozenset[str]]] = {}
        """For each digest of our own passes: when it expires, and the nodes it is for."""
        self._checked: BoundedDict[str, tuple[bool, float]] = BoundedDict(_MAX_PASSES)
        """For each digest of others' passes: whether it is valid, and until when that need not be checked."""
        self._asking = asyncio.Semaphore(_MAX_CHECKS)

    def register(self, server: RpcServer) -> None:
        """Register the peer method ``pass``."""
        server.method("pass", PassRequest, self._answer)

    async def issue(self, host: str) -> str:
        """Issue a pass, valid for `PASS_SECONDS` at the member whose host name or address is ``host``.

        Raises:
            Refusal: NOT_FOUND when no member has this address.
        """
        addresses = {address.partition("%")[0] for address, _ in await resolve(Seed(host, 0))}
        nodes = frozenset(r.node for r in self._view.live() if not addresses.isdisjoint(r.addresses))
        if not nodes:
            raise Refusal(Fault.NOT_FOUND, f"no member of this cluster is at {host[:100]}")
        now = self._clock()
        secret = f"{PREFIX}{self._view.me.node}.{secrets.token_hex(32)}"
        self._issued = {digest: entry for digest, entry in self._issued.items() if entry[0] > now}
        while len(self._issued) >= _MAX_PASSES:
            del self._issued[next(iter(self._issued))]
        self._issued[_hash(secret)] = now + PASS_SECONDS, nodes
        return secret

    def from_live(self, text: str) -> bool:
        """Return whether ``text`` looks like a pass of a live member."""
        found = _PASS.fullmatch(text)
        return found is not None and any(r.node == found[1] for r in self._view.live())

    async def check(self, text: str) -> bool:
        """Return whether ``text`` is a valid pass of a live member. That member's reply is cached."""
        found = _PASS.fullmatch(text)
        if found is None:
            return False
        node, digest, now = found[1], _hash(text), self._clock()
        if node == self._view.me.node:
            return self._remaining(digest, node) > 0
        # The passes of a node that is gone or evicted are no longer valid, whatever it replied before.
        if all(r.node != node for r in self._view.live()):
            return False
        valid, expiry = self._checked.get(digest, (False, 0.0))
        if now < expiry:
            return valid
        async with self._asking:
            try:
                answer = await self._calls.call(
                    node, "pass", PassRequest(digest), PassAnswer, timeout=_CALL_SECONDS
                )
            except PeerError:
                return False
        seconds = min(answer.seconds, PASS_SECONDS)
        self._checked[digest] = (seconds > 0, self._clock() + (seconds if seconds > 0 else _REFUSED_SECONDS))
        return seconds > 0

    async def _answer(self, caller: str, request: PassRequest) -> PassAnswer:
        return PassAnswer(self._remaining(request.digest, caller))

    def _remaining(self, digest: str, node: str) -> float:
        """Return the seconds for which our pass with this digest remains valid at ``node``."""
        end, nodes = self._issued.get(digest, (0.0, frozenset()))
        return max(0.0, end - self._clock()) if node in nodes else 0.0


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
