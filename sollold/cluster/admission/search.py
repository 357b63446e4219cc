"""Searches for a cluster to join, and for members of the own one that have a later secret."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import shlex
import time
from collections.abc import Awaitable, Callable, Container, Sequence

from sollold.cluster.admission.exchange import AdmissionState, Answer, ask, greeted
from sollold.cluster.admission.invitation import Invited, use_code
from sollold.cluster.admission.keyring import Keyring
from sollold.cluster.admission.policy import Standing, asks, behind, code_of, preferred
from sollold.cluster.gossip.actions import Address
from sollold.cluster.net.acceptor import is_loopback
from sollold.cluster.net.dialer import Dialer
from sollold.cluster.net.node_key import NodeKey
from sollold.cluster.net.rpc import PeerError

log = logging.getLogger("sollold.cluster")

_HEARD_SECONDS = 30.0
"""Seconds for which a machine that asked is considered a candidate."""
_MAX_CANDIDATES = 16
_MAX_PER_HOST = 4
"""Maximum candidates with one address: a machine can name any number of ports, and would crowd out others."""
_SEARCH_TURNS = 5
"""A node that is not alone looks in every n-th turn for members that have a later secret."""


Got = Callable[[str, str, Address, Keyring, bool, Keyring | None], Awaitable[None]]
"""(id, name, address of a member, the keyring it gave, whether that is a later one of the own cluster, the
own one when it was asked; None: an admin wants to join, whatever the own one is)."""


class ClusterSearch:
    """Finds machines and asks them for admission.

    Args:
        ring: returns the current keyring.
        port: returns this node's port for nodes.
        candidates: returns addresses of machines that are not live members, grouped by machine.
        present: returns ids of the live nodes, including this one.
        announced: whether one of some nodes is announced on the LAN under another cluster name.
        got: called with a keyring received from a member, see `Got`.
        changed: called when `seeking` changed.

    Attributes:
        asking: a request is in progress. A stranger that asks here meanwhile could get an outdated secret.
        waits_at: the node at which this one waits for an admin's approval; None: it does not wait.
        turned_out: it was evicted there.
    """

    def __init__(
        self,
        key: NodeKey,
        name: str,
        *,
        ring: Callable[[], Keyring],
        reach: Dialer,
        port: Callable[[], int],
        candidates: Callable[[], list[tuple[Address, ...]]],
        present: Callable[[], frozenset[str]],
        announced: Callable[[Container[str]], bool],
        got: Got,
        changed: Callable[[], None],
    ) -> None:
        self.asking = False
        self.waits_at: Standing | None = None
        self.turned_out = False
        self._key = key
        self._name = name
        self._ring = ring
        self._reach = reach
        self._port = port
        self._candidates = candidates
        self._present = present
        self._announced = announced
        self._got = got
        self._changed = changed
        self._heard: dict[Address, float] = {}
        self._waits_address: Address | None = None
        self._turn = 0

    @property
    def seeking(self) -> str:
        """Where this node waits for admission, as the end of a sentence; empty if it does not wait."""
        if self.waits_at is None:
            return ""
        code = code_of(self._key.public)
        if self.turned_out:
            return f"was evicted from the cluster of {self.waits_at.name}; its code is {code}"
        return f"waits for admission to the cluster of {self.waits_at.name}; its code is {code}"

    def hear(self, address: Address) -> None:
        """Note a stranger's address. If it does not ask us, we may have to ask it: it may not know us."""
        others = [heard for heard in self._heard if heard[0] == address[0] and heard != address]
        crowd = len(others) >= _MAX_PER_HOST and not is_loopback(address[0])
        if not crowd and (len(self._heard) < _MAX_CANDIDATES or address in self._heard):
            self._heard[address] = time.monotonic()

    def forget(self, now: float) -> None:
        """Forget strangers that asked long ago."""
        self._heard = {address: t for address, t in self._heard.items() if t > now - _HEARD_SECONDS}

    def may_look(self, own: Standing) -> bool:
        """Whether to look for a cluster to join, or for members that have a later secret."""
        ring = self._ring()
        if ring.open:
            return False
        if own.young or (own.alone and self.waits_at is not None):
            return True
        present = self._present()
        missing = ring.known - present
        if not missing:
            return False
        self._turn += 1
        return len(present) == 1 or self._announced(missing) or self._turn % _SEARCH_TURNS == 0

    async def look(self, own: Standing) -> None:
        """Contact the candidates, and ask the best one."""
        before = self._ring()
        targets = self._targets()
        replies = await asyncio.gather(*(greeted(self._reach, self._port(), group) for group in targets))
        if differs(before, self._ring()):
            return
        waits_at = self.waits_at.founder if self.waits_at is not None else ""
        known = self._ring().known - {self._key.node}
        askable = {
            standing: address
            for standing, address in filter(None, replies)
            if behind(own, standing, known) or asks(own, standing, waits_at)
        }
        if not askable:
            return
        newer = [s for s in askable if behind(own, s, known)]
        chosen = max(newer, key=lambda s: (s.generation, s.cluster)) if newer else preferred([*askable])
        if self.waits_at is not None:
            # Keep asking the node at which an admin may approve this one.
            chosen = next((s for s in newer or askable if s.node == self.waits_at.node), chosen)
        address = askable[chosen]
        self.asking = True
        try:
            with contextlib.suppress(PeerError, TimeoutError, OSError):
                answer = await ask(self._reach, self._key, self._name, self._port(), chosen.node, address)
                if not differs(before, self._ring()):
                    await self._answered(chosen, address, answer, before, newer=bool(newer))
        finally:
            self.asking = False

    def _targets(self) -> list[tuple[Address, ...]]:
        """Return the candidates to contact, grouped by machine; of too many a random selection."""
        found = [*dict.fromkeys([*self._candidates(), *((address,) for address in self._heard)])]
        # An admin sees this node as waiting there only while it keeps asking.
        kept = [group for group in found if self._waits_address in group][:1]
        others = [group for group in found if group not in kept]
        room = _MAX_CANDIDATES - len(kept)
        return kept + (random.sample(others, room) if len(others) > room else others)

    async def _answered(
        self, member: Standing, address: Address, answer: Answer, before: Keyring, *, newer: bool
    ) -> None:
        if answer.state in (AdmissionState.WAITING, AdmissionState.EVICTED):
            self.turned_out = answer.state is AdmissionState.EVICTED
            new = self.waits_at is None or self.waits_at.founder != member.founder
            self.waits_at, self._waits_address = member, address
            if new:
                log.warning("%s: sollold admit %s there", member.name, shlex.quote(self._name))
                log.warning("this node %s", self.seeking)
            self._changed()
        elif answer.state is AdmissionState.ADMITTED:
            self.wait_no_more()
            await self._got(member.node, member.name, address, answer.keyring(member.node), newer, before)

    async def accept(self, code: str, addresses: Sequence[Address]) -> Invited:
        """Ask the member at ``addresses`` to be admitted by a code; if it is right, join that cluster.

        Raises:
            PeerError: it does not respond there, or not correctly.
            TimeoutError: it took too long.
        """
        self.asking = True
        try:
            invited = await use_code(self._reach, self._key, self._name, code, addresses)
            if invited.answer is not None:
                ring = invited.answer.keyring(invited.node)
                await self._got(invited.node, invited.name, invited.address, ring, False, None)
            return invited
        finally:
            self.asking = False

    def wait_no_more(self) -> None:
        """Stop waiting: this node was admitted, or has admitted another machine to its own cluster."""
        self.waits_at, self._waits_address, self.turned_out = None, None, False


def differs(before: Keyring, now: Keyring) -> bool:
    """Whether the node admitted a machine meanwhile, which it must not leave alone, or got another secret."""
    return (now.alone, now.secret) != (before.alone, before.secret)
