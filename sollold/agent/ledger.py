"""The memory ledger of one node: what is set aside, for whom, until when.

Sans-I/O. Each call takes the time on a monotonic clock of the caller's, in seconds, and gives the answer
together with the actions to carry out. The node is the only writer of its ledger, so two leaders in a
split network can compete for a byte but never both have it.

A grant's life::

    reserve ──► RESERVED ──commit──► COMMITTED ──release / head silent──► ending ──ended──► free
                   └──release / not committed in time──► free

An ending grant still counts: its bytes are free only when the caller says `Ledger.ended`, that is when
the process that used them is dead.

How much one more grant could get is `sollold.agent.memory_room`'s to say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from sollold.agent.memory_room import MeasuredMemory, MemoryRoom
from sollold.cluster.gossip.record import Grant, GrantState
from sollold.cluster.gossip.term import Term
from sollold.engines.commands import GRANT_SECONDS, Commit, Done, Release, Renew, Reserve, Reserved
from sollold.facts import dataclass
from sollold.machine.device import Device

RESERVATION_SECONDS = 15.0
"""How long a reservation waits for its commit."""

_NAME_BYTES = 200


@dataclass(frozen=True, slots=True)
class KillWorker:
    """End the processes of ``deployment`` on this node, then call `Ledger.ended`."""

    deployment: str
    reason: str


@dataclass(frozen=True, slots=True)
class PersistTerm:
    """Write ``term`` to disk before the answer is sent."""

    term: Term


@dataclass(frozen=True, slots=True)
class GrantsChanged:
    """Grants are no longer what they were: the record must say so."""


Action = KillWorker | PersistTerm | GrantsChanged


@dataclass(slots=True)
class _Entry:
    """All that one deployment has on this node."""

    head: str
    bytes: dict[str, int]
    state: GrantState
    deadline: float
    ending: bool = False


class Ledger:
    """What this node has granted. Pure; see above for a grant's life.

    Args:
        term: the newest term seen before, from disk.
        ready: False refuses every reservation until `reconciled`: after a start nothing is granted
            before the processes that an earlier run left behind are ended.
        node_limit: most bytes over all devices; 0: no such limit.
        name: a node's name for people, by its id.
    """

    def __init__(
        self,
        *,
        term: Term | None = None,
        ready: bool = False,
        node_limit: int = 0,
        reservation_seconds: float = RESERVATION_SECONDS,
        grant_seconds: float = GRANT_SECONDS,
        name: Callable[[str], str] = str,
    ) -> None:
        self._name = name
        self.term = term or Term()
        self.draining = False
        self._ready = ready
        self._node_limit = node_limit
        self._reservation_seconds = reservation_seconds
        self._grant_seconds = grant_seconds
        self._measured = MeasuredMemory()
        self._entries: dict[str, _Entry] = {}

    # What is known

    @property
    def ready(self) -> bool:
        """Whether reservations are taken."""
        return self._ready

    def holds(self, deployment: str) -> bool:
        """Whether anything is set aside for ``deployment``, ending or not."""
        return deployment in self._entries

    def live(self, deployment: str) -> bool:
        """Whether ``deployment`` has a grant or reservation that is not ending."""
        entry = self._entries.get(deployment)
        return entry is not None and not entry.ending

    def deployments(self) -> frozenset[str]:
        """All for which anything is set aside, ending or not."""
        return frozenset(self._entries)

    def bytes_of(self, deployment: str) -> dict[str, int]:
        """Device → bytes set aside for ``deployment``."""
        entry = self._entries.get(deployment)
        return dict(entry.bytes) if entry else {}

    def grants(self) -> tuple[Grant, ...]:
        """Everything set aside, for the record; sorted."""
        return tuple(
            Grant(deployment, device, size, entry.head, entry.state)
            for deployment, entry in sorted(self._entries.items())
            for device, size in sorted(entry.bytes.items())
        )

    def devices(self) -> tuple[Device, ...]:
        """The devices as measured, with ``granted`` and ``available`` of this moment.

        What is ``available`` to each member of a pool is what the pool has: it is there once.
        """
        room = self._room()
        return tuple(
            replace(
                device,
                granted=room.granted_on(device.id),
                available=room.available(device.id),
                reserve=self._measured.reserves.get(device.id, 0),
            )
            for device in self._measured.devices
        )

    def available(self, device: str) -> int:
        """Bytes that one more grant could get on ``device`` now; 0 for an unknown one."""
        return self._room().available(device)

    def next_deadline(self) -> float | None:
        """When `expire` has something to do; None when nothing can expire."""
        return min((entry.deadline for entry in self._entries.values() if not entry.ending), default=None)

    # Events

    def reconciled(self) -> tuple[Action, ...]:
        """What an earlier run left behind is gone: reservations are taken from now on."""
        self._ready = True
        return (GrantsChanged(),)

    def measured(self, measured: MeasuredMemory) -> tuple[Action, ...]:
        """The devices as they are now."""
        before = self.devices()
        self._measured = measured
        return (GrantsChanged(),) if self.devices() != before else ()

    def reserve(self, request: Reserve, now: float) -> tuple[Reserved, tuple[Action, ...]]:
        """Set bytes aside until the commit, all that is asked or nothing.

        The same request again renews the reservation. A request with other bytes replaces an
        uncommitted reservation of the same deployment.
        """
        actions = list(self.expire(now))
        refusal = self._see(request.term, actions) or self._reserve(request, now, actions)
        room = self._room()
        available = {device.id: room.available(device.id) for device in self._measured.devices}
        return Reserved(not refusal, refusal, available), tuple(actions)

    def _reserve(self, request: Reserve, now: float, actions: list[Action]) -> str:
        """Why nothing was set aside, or empty."""
        if not self._ready:
            return "the node has just started and is still cleaning up"
        if not _is_name(request.deployment):
            return "invalid deployment id: use letters, digits, - and _"
        if self.draining:
            return "the node is draining and accepts no new deployments"
        wanted = {device: size for device, size in request.bytes.items() if size}
        if any(size < 0 for size in wanted.values()):
            return "a negative number of bytes was asked for"
        entry = self._entries.get(request.deployment)
        if entry is not None:
            if entry.ending:
                return f"deployment {request.deployment} is ending here"
            same = entry.head == request.head and entry.bytes == wanted
            if entry.state is GrantState.COMMITTED:
                return "" if same else f"deployment {request.deployment} is already committed"
            if same:
                entry.deadline = now + self._reservation_seconds
                return ""
        others = {name: sizes for name, sizes in self._granted().items() if name != request.deployment}
        if missing := self._room(others).missing(wanted):
            return missing
        self._entries.pop(request.deployment, None)
        self._entries[request.deployment] = _Entry(
            request.head, wanted, GrantState.RESERVED, now + self._reservation_seconds
        )
        actions.append(GrantsChanged())
        return ""

    def withdraw(self, deployment: str) -> tuple[Action, ...]:
        """Give back what was reserved, since the leader is told that it is not. What is committed stays."""
        actions: list[Action] = []
        entry = self._entries.get(deployment)
        if entry is not None and entry.state is GrantState.RESERVED:
            self._end(deployment, "withdrawn", actions)
        return tuple(actions)

    def commit(self, request: Commit, now: float) -> tuple[Done, tuple[Action, ...]]:
        """The head takes up its reservation. Again: the same answer."""
        actions = list(self.expire(now))
        entry, refusal = self._owned(request.deployment, request.head)
        if entry is None:
            return refusal, tuple(actions)
        absent = sorted(set(request.devices) - set(entry.bytes))
        if absent:
            refusal = Done(False, f"nothing is reserved on {', '.join(absent)} for {request.deployment}")
            return refusal, tuple(actions)
        entry.deadline = now + self._grant_seconds
        if entry.state is not GrantState.COMMITTED:
            entry.state = GrantState.COMMITTED
            actions.append(GrantsChanged())
        return Done(True), tuple(actions)

    def renew(self, request: Renew, now: float) -> tuple[Done, tuple[Action, ...]]:
        """The head is alive: its committed grant lives on."""
        actions = self.expire(now)
        entry, refusal = self._owned(request.deployment, request.head)
        if entry is None:
            return refusal, actions
        if entry.state is not GrantState.COMMITTED:
            return Done(False, f"deployment {request.deployment} is reserved but not committed here"), actions
        entry.deadline = now + self._grant_seconds
        return Done(True), actions

    def release(self, request: Release, caller: str, now: float) -> tuple[Done, tuple[Action, ...]]:
        """End what a deployment has here. Its head may always; anyone else needs the newest term.

        Done at once for a reservation. A committed grant is ending until `ended`.
        """
        actions = list(self.expire(now))
        entry = self._entries.get(request.deployment)
        if entry is None or entry.head != caller:
            stale = self._see(request.term, actions)
            if stale:
                return Done(False, stale), tuple(actions)
        if entry is not None and not entry.ending:
            self._end(request.deployment, f"released by {self._name(caller)}", actions)
        return Done(True), tuple(actions)

    def head_of(self, deployment: str) -> str:
        """The head of what ``deployment`` has here; empty when it has nothing."""
        entry = self._entries.get(deployment)
        return entry.head if entry is not None else ""

    def see(self, term: Term) -> tuple[str, tuple[Action, ...]]:
        """A command that is no ledger's business carries ``term``: why it is refused, or empty."""
        actions: list[Action] = []
        return self._see(term, actions), tuple(actions)

    def expire(self, now: float) -> tuple[Action, ...]:
        """End what nobody committed or renewed in time."""
        actions: list[Action] = []
        for deployment, entry in list(self._entries.items()):
            if not entry.ending and now >= entry.deadline:
                self._end(deployment, f"its head {self._name(entry.head)} did not renew it in time", actions)
        return tuple(actions)

    def postpone(self, seconds: float) -> None:
        """The daemon itself did not run for so long: nobody could commit or renew meanwhile."""
        for entry in self._entries.values():
            entry.deadline += seconds

    def end_deployment(self, deployment: str, reason: str) -> tuple[Action, ...]:
        """Its worker died, or this node wants it gone: end what ``deployment`` has here."""
        actions: list[Action] = []
        if self.live(deployment):
            self._end(deployment, reason, actions)
        return tuple(actions)

    def ended(self, deployment: str) -> tuple[Action, ...]:
        """The processes of ``deployment`` are dead: its bytes are free. Ignored unless it is ending."""
        entry = self._entries.get(deployment)
        if entry is None or not entry.ending:
            return ()
        del self._entries[deployment]
        rest = {name: sizes for name, sizes in self._measured.allocated.items() if name != deployment}
        self._measured = replace(self._measured, allocated=rest)
        return (GrantsChanged(),)

    # Inside

    def _see(self, term: Term, actions: list[Action]) -> str:
        if term < self.term:
            return (
                f"the command of {self._name(term.leader) or 'nobody'} in term {term.counter} is older than "
                f"term {self.term.counter} of {self._name(self.term.leader)}"
            )
        if term > self.term:
            self.term = term
            actions.append(PersistTerm(term))
        return ""

    def _owned(self, deployment: str, head: str) -> tuple[_Entry | None, Done]:
        entry = self._entries.get(deployment)
        if entry is None or entry.ending:
            return None, Done(
                False, f"nothing is reserved for deployment {deployment}: it expired or was released"
            )
        if entry.head != head:
            return None, Done(False, f"deployment {deployment} belongs to head {self._name(entry.head)}")
        return entry, Done(True)

    def _end(self, deployment: str, reason: str, actions: list[Action]) -> None:
        entry = self._entries[deployment]
        if entry.state is GrantState.COMMITTED:
            entry.ending = True
            actions.append(KillWorker(deployment, reason))
        else:
            del self._entries[deployment]
        actions.append(GrantsChanged())

    def _granted(self) -> dict[str, dict[str, int]]:
        return {deployment: entry.bytes for deployment, entry in self._entries.items()}

    def _room(self, granted: Mapping[str, Mapping[str, int]] | None = None) -> MemoryRoom:
        """What is left beside ``granted``; None: beside all that is set aside."""
        return MemoryRoom(self._measured, self._granted() if granted is None else granted, self._node_limit)


def _is_name(deployment: str) -> bool:
    """Whether it can name a folder, as it will for logs and tensors: any member may send any text."""
    ascii_name = deployment.replace("-", "").replace("_", "").isalnum()
    return ascii_name and len(deployment.encode("utf-8", "replace")) <= _NAME_BYTES
