"""Manages the cluster's secret on this node: who gets it, and what changes it."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Container, Iterable
from dataclasses import replace

from sollold.cluster.admission.change import Refused, caught_up, obeyed, seen, settled, unsettled, used
from sollold.cluster.admission.clock import ClockWatch
from sollold.cluster.admission.exchange import AdmissionState, Answer, Welcome
from sollold.cluster.admission.invitation import Invitations
from sollold.cluster.admission.keyring import Admitted, Keyring, KeyringFile
from sollold.cluster.admission.orders import SecretAnswer, SecretOrder, Step
from sollold.cluster.admission.policy import Standing, code_of, standing_of
from sollold.cluster.admission.search import ClusterSearch, differs
from sollold.cluster.admission.waiting import WaitingList
from sollold.cluster.gossip.actions import Address
from sollold.cluster.gossip.record import WaitingMachine
from sollold.cluster.gossip.record_check import printable_name
from sollold.cluster.net.dialer import Dialer
from sollold.cluster.net.node_key import NodeKey, id_of_key
from sollold.cluster.net.state_file import BackgroundWriter
from sollold.retry import LogAndRetry
from sollold.tasks import cancel_and_wait

log = logging.getLogger("sollold.cluster")

LOOK_SECONDS = 2.0
"""Seconds between searches for a cluster to join."""
_PAUSE_FACTOR = 3
"""Factor by which the pause is longer for a node that is not alone."""
_MAX_ADMITTED = 256
_CHECK_SECONDS = 2.0
"""Timeout of the check that the secret can be saved: the leader waits three seconds for the answer."""
_SETTLE_SECONDS = 60.0
"""Seconds after which an unfinished change of the secret is ended here."""


class Admission:
    """Keeps the keyring and answers strangers; the results of `search` may replace the keyring.

    Args:
        ring: the cluster's secret, as read from disk.
        door: seconds after its founding during which the cluster admits any machine that asks.
        port: returns this node's port for nodes.
        candidates, present, announced: see `ClusterSearch`.
        apply: called when the accepted secrets or the refused nodes changed.
        moved: called when another cluster admitted this node, after the keyring has its secret: with the
            admitting member and its address.
        met: called when this node fetched the changed secret of its own cluster, with the same.
        changed: called when `waiting`, the door, or the cluster at which this node waits changed.

    Attributes:
        ring: the current keyring.
        invitations: admits machines by a code.
        search: looks for a cluster to join.
    """

    def __init__(
        self,
        key: NodeKey,
        name: str,
        ring: Keyring,
        file: KeyringFile,
        *,
        door: float,
        reach: Dialer,
        port: Callable[[], int],
        candidates: Callable[[], list[tuple[Address, ...]]],
        present: Callable[[], frozenset[str]],
        announced: Callable[[Container[str]], bool],
        apply: Callable[[], Awaitable[None]],
        moved: Callable[[str, Address], Awaitable[None]],
        met: Callable[[str, Address], None],
        changed: Callable[[], None],
    ) -> None:
        self.ring = ring
        self._key = key
        self._name = name
        self._door = door
        self._apply = apply
        self._moved = moved
        self._met = met
        self._changed = changed
        self._file = file
        self._writer = BackgroundWriter("the keyring", lambda: self.ring, file.write)
        self._opened_until = 0.0
        self._waiting = WaitingList()
        self.invitations = Invitations(
            key,
            name,
            let_in=lambda node, name: self.let_in(node, name, "invitation"),
            refused=lambda node: node in self.ring.refused,
            changed=changed,
        )
        self.search = ClusterSearch(
            key,
            name,
            ring=lambda: self.ring,
            reach=reach,
            port=port,
            candidates=candidates,
            present=present,
            announced=announced,
            got=self._receive_secret,
            changed=changed,
        )
        self._open = False
        self._clock = ClockWatch()
        self._steps = asyncio.Lock()
        self._unapplied = False
        self._stepped = time.monotonic()
        self._following: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """Stop, and finish pending writes."""
        self.invitations.close()
        await cancel_and_wait(self._following)
        await self._writer.close()

    # Current state

    @property
    def open_seconds(self) -> float:
        """Remaining seconds in which any machine that asks is admitted; 0: an admin decides."""
        first = 0.0 if self.ring.closed else self._door - self.ring.age()
        return max(0.0, first, self._opened_until - time.monotonic())

    @property
    def waiting(self) -> tuple[WaitingMachine, ...]:
        """Machines that ask to be admitted."""
        return self._waiting.shown

    def standing(self) -> Standing:
        """Return this node's standing, as sent to strangers."""
        return standing_of(self.ring, self._key.node, self._name, self.open_seconds > 0)

    # Admitting others

    def welcome(self) -> Welcome | None:
        """Return the protocol for a stranger's connection; None in an open cluster."""
        if self.ring.open:
            return None
        return Welcome(self._key, self.standing, self.answer, self.search.hear)

    def answer(self, key: bytes, name: str, address: str) -> Answer:
        """Decide on a stranger at ``address`` that proved ``key``."""
        if self.search.asking or self.search.turned_out:
            return Answer(AdmissionState.BUSY)
        node, now = id_of_key(key), time.monotonic()
        name = printable_name(name) or node
        method = ""
        if node in self.ring.refused:
            self._add_waiting(node, name, key, address)
            return Answer(AdmissionState.EVICTED)
        if node in self.ring.known:
            method = "known"
        elif self.open_seconds > 0:
            method = "door"
        elif self._waiting.approved(node, now):
            method = "admin"
        if not method:
            self._add_waiting(node, name, key, address)
            return Answer(AdmissionState.WAITING)
        return self.let_in(node, name, method)

    def let_in(self, node: str, name: str, method: str) -> Answer:
        """Admit a machine that proved its key. ``method``: `Admitted.by`, or ``known`` for a member.

        Returns the answer with the secret.
        """
        self._waiting.remove(node)
        if method == "known":
            log.info("%s (%s), a member, fetched the secret", name, node)
        else:
            suffix = {"admin": " by an admin", "invitation": " by an invitation"}.get(method, "")
            log.info("%s (%s) was admitted%s", name, node, suffix)
            admitted = (*self.ring.admitted, Admitted(node, name, method, time.time()))
            self.ring = replace(self.ring, alone=False, admitted=admitted[-_MAX_ADMITTED:])
            self.search.wait_no_more()
            self._save()
            self._changed()
        ring = self.ring
        age = min(ring.age(), 1e12)
        return Answer(
            AdmissionState.ADMITTED,
            ring.secret,
            ring.founder,
            age,
            ring.generation,
            ring.members,
            ring.evicted,
            ring.closed,
        )

    def _add_waiting(self, node: str, name: str, key: bytes, address: str) -> None:
        """Show a machine that is not admitted as waiting."""
        evicted = node in self.ring.refused
        if self._waiting.add(WaitingMachine(node, name, code_of(key), evicted), address, time.monotonic()):
            request = "was evicted and asks to be admitted again" if evicted else "asks to be admitted"
            log.warning("%s (%s) %s, code %s: sollold admit", name, node, request, code_of(key))
        self._changed()

    def admit(self, node: str) -> bool:
        """Approve the waiting machine with this id, so that it is admitted when it asks again.

        False if it is not waiting or was evicted.
        """
        return node not in self.ring.refused and self._waiting.approve(node, time.monotonic())

    def open_for(self, seconds: float) -> None:
        """Admit any machine that asks within these seconds; 0 ends that, and the first hour."""
        self._opened_until = time.monotonic() + seconds
        if not seconds and not self.ring.closed:
            self.ring = replace(self.ring, closed=True)
            self._save()
        self._changed()

    def _save(self) -> None:
        if not self.ring.open:
            self._writer.request()

    # Changing the secret

    async def obey(self, order: SecretOrder) -> SecretAnswer:
        """Carry out one step of a change of the secret."""
        async with self._steps:
            try:
                ring = obeyed(self.ring, order, self._key.node)
                if self.ring.open and order.step is Step.INSTALL:
                    await self._check_kept()
            except Refused as refused:
                return SecretAnswer(str(refused), self.ring.newest, self.ring.members)
            await self._take(ring)
            return SecretAnswer("", ring.newest, ring.members)

    async def _check_kept(self) -> None:
        """Check that the first secret can be saved.

        A node that lost it would be open to anyone again after its next start. A later secret could be
        fetched from a member, by this node's key.

        Raises:
            Refused: the secret could not be saved.
        """
        try:
            async with asyncio.timeout(_CHECK_SECONDS):
                why = await asyncio.to_thread(self._file.why_not_kept)
        except TimeoutError:
            why = "the disk of its state folder does not answer"
        if why:
            raise Refused(f"it could not save the secret: {why}")

    def heard(self, token: bytes) -> None:
        """Note that a member uses ``token``. If it is the pending one, all have it and our order was lost."""
        pending = self.ring.pending
        if pending is None or token != bytes.fromhex(pending.secret) or self._following is not None:
            return

        async def follow() -> None:
            async with self._steps:
                if self.ring.pending is pending:
                    await self._take(used(self.ring, pending))

        self._following = asyncio.get_running_loop().create_task(follow(), name="secret")
        self._following.add_done_callback(self._followed)

    def _followed(self, task: asyncio.Task[None]) -> None:
        self._following = None
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the new secret could not be used", exc_info=error)

    async def _take(self, ring: Keyring) -> None:
        """Switch to another keyring."""
        before, self.ring = self.ring, ring
        if ring == before and not self._unapplied:
            return
        self._stepped = time.monotonic()
        self._save()
        if ring.secret != before.secret:
            log.info("the cluster has a new secret, generation %d", ring.generation)
        if self._unapplied or (ring.tokens, ring.refused) != (before.tokens, before.refused):
            # If this fails, for example for lack of file descriptors, it is tried again in `run`.
            self._unapplied = True
            await self._apply()
            self._unapplied = False
        self._changed()

    def saw(self, live: Iterable[tuple[str, str]]) -> None:
        """Remember these machines (id, name), members that are alive now."""
        ring = seen(self.ring, live)
        if ring is not self.ring:
            self.ring = ring
            self._save()

    # Periodic work

    async def run(self) -> None:
        """Search for a cluster while permitted, and end unfinished changes, until cancelled."""
        attempt = LogAndRetry("the search for a cluster", log)
        while True:
            with attempt:
                now = time.monotonic()
                self._follow_clock()
                own = self.standing()
                if self.search.may_look(own):
                    await self.search.look(own)
                self.search.forget(now)
                if self._waiting.forget(now):
                    self._changed()
                if (self.open_seconds > 0) != self._open:
                    self._open = not self._open
                    self._changed()
                if self._unapplied:
                    async with self._steps:
                        await self._take(self.ring)
                if unsettled(self.ring) and now - self._stepped > _SETTLE_SECONDS:
                    async with self._steps:
                        await self._take(settled(self.ring))
            pause = LOOK_SECONDS if self.ring.alone else _PAUSE_FACTOR * LOOK_SECONDS
            await asyncio.sleep(pause * random.uniform(0.8, 1.2))

    def _follow_clock(self) -> None:
        """Preserve the cluster's age when this machine's clock is set.

        A founding after the time that the clock showed was written by a right clock, before a restart.
        """
        moved = self._clock.moved()
        if moved and 0 < self.ring.founded <= time.time() - moved:
            self.ring = replace(self.ring, founded=self.ring.founded + moved)
            self._save()
            self._changed()

    async def _receive_secret(
        self, node: str, name: str, address: Address, ring: Keyring, newer: bool, before: Keyring | None
    ) -> None:
        """Handle a secret received from a member; see `sollold.cluster.admission.search.Got`."""
        if not (newer and ring.founder == self.ring.founder):
            await self._join(node, name, address, ring, before)
            return
        async with self._steps:
            if ring.generation < self.ring.generation:
                return
            log.info("the secret was changed while this node was away: fetched from %s", name)
            await self._take(caught_up(self.ring, ring))
        self._met(node, address)

    async def _join(
        self, node: str, name: str, address: Address, ring: Keyring, before: Keyring | None
    ) -> None:
        """Switch to another cluster, whose member ``node`` gave this one ``ring``."""
        async with self._steps:
            # An invitation may have been used here while this waited for a change of the secret to end.
            if before is not None and differs(before, self.ring):
                return
            self.ring = ring
            self.search.wait_no_more()
            # An admin's decisions were about the former cluster.
            self._waiting.clear()
            self._opened_until = 0.0
            self.invitations.close()
            self._save()
            log.info("admitted to the cluster of %s (%s)", name, node)
            self._unapplied = True
            await self._moved(node, address)
            self._unapplied = False
        self._changed()
