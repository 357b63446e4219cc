"""The memory ledger of one node: what is reserved or granted, to which deployment, and until when.

Sans-I/O. Each call takes the time of the caller's monotonic clock in seconds, and returns its result
together with the actions to carry out. The node is the only writer of its ledger, so two leaders in a
split network can compete for memory but never both get it.

A grant's life::

    reserve ──► RESERVED ──commit──► COMMITTED ──release / head silent──► ending ──ended──► free
                   └──release / not committed in time──► free

An ending grant still counts: its memory is free only when the caller calls `Ledger.ended`, once the
processes that used it are dead.

`sollold.agent.memory_room` computes how much another grant could get.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from sollold.agent.memory_room import MeasuredMemory, MemoryRoom
from sollold.cluster.gossip.record import Grant, GrantState
from sollold.cluster.gossip.term import TERM_STEP, Term
from sollold.engines.commands import GRANT_SECONDS, Commit, Done, Release, Renew, Reserve, Reserved
from sollold.facts import dataclass
from sollold.machine.device import Device

RESERVATION_SECONDS = 15.0
"""How long a reservation waits for its commit, in seconds."""

_MAX_NAME_BYTES = 200


@dataclass(frozen=True, slots=True)
class KillWorker:
    """Kill the processes of ``deployment`` on this node, then call `Ledger.ended`."""

    deployment: str
    reason: str


@dataclass(frozen=True, slots=True)
class PersistTerm:
    """Write ``term`` to disk before the reply is sent."""

    term: Term


@dataclass(frozen=True, slots=True)
class GrantsChanged:
    """The grants or devices have changed, and the record must be updated."""


Action = KillWorker | PersistTerm | GrantsChanged


@dataclass(slots=True)
class _Entry:
    """Everything that one deployment has on this node."""

    head: str
    bytes: dict[str, int]
    state: GrantState
    deadline: float
    ending: bool = False

    def is_for(self, request: Reserve) -> bool:
        """Return whether it has exactly what is requested."""
        return self.head == request.head and self.bytes == _nonzero(request.bytes)


class Ledger:
    """This node's grants. Pure; see the module for a grant's life.

    Args:
        term: the newest term seen earlier, from disk.
        ready: if False, every reservation is refused until `reconciled`: after a start nothing is granted
            before an earlier run's processes have been ended.
        node_limit: maximum bytes over all devices; 0: unlimited.
        name: returns a node's display name for its id.
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

    # State

    def holds(self, deployment: str) -> bool:
        """Return whether ``deployment`` has a reservation or grant, ending or not."""
        return deployment in self._entries

    def live(self, deployment: str) -> bool:
        """Return whether ``deployment`` has a reservation or grant that is not ending."""
        entry = self._entries.get(deployment)
        return entry is not None and not entry.ending

    def deployments(self) -> frozenset[str]:
        """Return all deployments with a reservation or grant, ending or not."""
        return frozenset(self._entries)

    def bytes_of(self, deployment: str) -> dict[str, int]:
        """Return device → bytes reserved for or granted to ``deployment``."""
        entry = self._entries.get(deployment)
        return dict(entry.bytes) if entry else {}

    def grants(self) -> tuple[Grant, ...]:
        """Return all reservations and grants for the record, sorted."""
        return tuple(
            Grant(deployment, device, size, entry.head, entry.state)
            for deployment, entry in sorted(self._entries.items())
            for device, size in sorted(entry.bytes.items())
        )

    def devices(self) -> tuple[Device, ...]:
        """Return the devices as measured, with the current ``granted`` and ``available``.

        Each member of a pool shows all of the pool's ``available`` memory, which exists only once.
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
        """Return the bytes that another grant could get on ``device`` now; 0 if it is unknown."""
        return self._room().available(device)

    def next_deadline(self) -> float | None:
        """Return when `expire` will have something to do; None if nothing can expire."""
        return min((entry.deadline for entry in self._entries.values() if not entry.ending), default=None)

    # Events

    def reconciled(self) -> tuple[Action, ...]:
        """Accept reservations from now on: an earlier run's processes are gone."""
        self._ready = True
        return (GrantsChanged(),)

    def measured(self, measured: MeasuredMemory) -> tuple[Action, ...]:
        """Take over a new measurement of the devices."""
        previous = self.devices()
        self._measured = measured
        return (GrantsChanged(),) if self.devices() != previous else ()

    def reserve(self, request: Reserve, now: float) -> tuple[Reserved, tuple[Action, ...]]:
        """Reserve memory until the commit: all that is requested or nothing.

        The same request again renews the reservation. A request for other amounts replaces an uncommitted
        reservation of the same deployment.
        """
        actions = list(self.expire(now))
        if refusal := self._see(request.term, actions) or self._objection(request):
            return Reserved(False, refusal), tuple(actions)
        missing = self._reserve(request, now, actions)
        room = self._room()
        available = {device.id: room.available(device.id) for device in self._measured.devices}
        return Reserved(not missing, missing, available), tuple(actions)

    def _objection(self, request: Reserve) -> str:
        """Return why a request is refused whatever memory is free, or an empty string."""
        if not self._ready:
            return "the node has just started and is still cleaning up"
        if not _is_name(request.deployment):
            return "invalid deployment id: use letters, digits, - and _"
        if self.draining:
            return "the node is draining and accepts no new deployments"
        if any(size < 0 for size in request.bytes.values()):
            return "a negative number of bytes was requested"
        entry = self._entries.get(request.deployment)
        if entry is not None and entry.ending:
            return f"deployment {request.deployment} is ending here"
        if entry is not None and entry.state is GrantState.COMMITTED and not entry.is_for(request):
            return f"deployment {request.deployment} is already committed"
        return ""

    def _reserve(self, request: Reserve, now: float, actions: list[Action]) -> str:
        """Reserve; return what is missing, or an empty string."""
        entry = self._entries.get(request.deployment)
        if entry is not None and entry.is_for(request):
            if entry.state is GrantState.RESERVED:
                entry.deadline = now + self._reservation_seconds
            return ""
        wanted = _nonzero(request.bytes)
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
        """Cancel a reservation whose request is answered with a refusal. Committed grants stay."""
        actions: list[Action] = []
        entry = self._entries.get(deployment)
        if entry is not None and entry.state is GrantState.RESERVED:
            self._end(deployment, "withdrawn", actions)
        return tuple(actions)

    def commit(self, request: Commit, now: float) -> tuple[Done, tuple[Action, ...]]:
        """Turn the head's reservation into a grant. Idempotent."""
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
        """Extend a committed grant: its head is alive."""
        actions = self.expire(now)
        entry, refusal = self._owned(request.deployment, request.head)
        if entry is None:
            return refusal, actions
        if entry.state is not GrantState.COMMITTED:
            return Done(False, f"deployment {request.deployment} is reserved but not committed here"), actions
        entry.deadline = now + self._grant_seconds
        return Done(True), actions

    def release(self, request: Release, caller: str, now: float) -> tuple[Done, tuple[Action, ...]]:
        """End what a deployment has here. Its head always may; any other caller needs the newest term.

        A reservation is freed at once. A committed grant is ending until `ended`.
        """
        actions = list(self.expire(now))
        entry = self._entries.get(request.deployment)
        if entry is None or entry.head != caller:
            refusal = self._see(request.term, actions)
            if refusal:
                return Done(False, refusal), tuple(actions)
        if entry is not None and not entry.ending:
            self._end(request.deployment, f"released by {self._name(caller)}", actions)
        return Done(True), tuple(actions)

    def head_of(self, deployment: str) -> str:
        """Return the head of what ``deployment`` has here; empty if it has nothing."""
        entry = self._entries.get(deployment)
        return entry.head if entry is not None else ""

    def unauthorized(self, caller: str, term: Term, elected: Term) -> str:
        """Return why ``caller``, authenticated by TLS, may not command in ``term``; empty if it may.

        ``elected``: the current term in this node's view of the cluster.
        """
        if term < self.term:
            return ""  # it is refused with another reason, see `see`
        if caller != term.leader:
            return f"{self._name(caller)} sent a command in a term of {self._name(term.leader) or 'nobody'}"
        highest = max(self.term, elected)
        if term.counter > highest.counter + TERM_STEP:
            return f"term {term.counter} is too far ahead of term {highest.counter} to follow from elections"
        return ""

    def see(self, term: Term) -> tuple[str, tuple[Action, ...]]:
        """Check the ``term`` of another command; return why it is refused, or an empty string."""
        actions: list[Action] = []
        return self._see(term, actions), tuple(actions)

    def expire(self, now: float) -> tuple[Action, ...]:
        """End what was not committed or renewed in time."""
        actions: list[Action] = []
        for deployment, entry in list(self._entries.items()):
            if not entry.ending and now >= entry.deadline:
                self._end(deployment, f"its head {self._name(entry.head)} did not renew it in time", actions)
        return tuple(actions)

    def postpone(self, seconds: float) -> None:
        """Extend all deadlines by the time in which this daemon did not run and could receive no renewals."""
        for entry in self._entries.values():
            entry.deadline += seconds

    def end_deployment(self, deployment: str, reason: str) -> tuple[Action, ...]:
        """End what ``deployment`` has here: its worker died, or this node wants it gone."""
        actions: list[Action] = []
        if self.live(deployment):
            self._end(deployment, reason, actions)
        return tuple(actions)

    def ended(self, deployment: str) -> tuple[Action, ...]:
        """Free the memory of ``deployment``, whose processes are dead. Ignored unless it is ending."""
        entry = self._entries.get(deployment)
        if entry is None or not entry.ending:
            return ()
        del self._entries[deployment]
        self._measured = self._measured.without(deployment)
        return (GrantsChanged(),)

    # Internal

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
        """Return the room beside ``granted``; None: beside everything reserved or granted."""
        return MemoryRoom(self._measured, self._granted() if granted is None else granted, self._node_limit)


def _nonzero(sizes: Mapping[str, int]) -> dict[str, int]:
    return {device: size for device, size in sizes.items() if size}


def _is_name(deployment: str) -> bool:
    """Return whether it is safe as a folder name, for logs and tensors: any member may send any string."""
    ascii_name = deployment.replace("-", "").replace("_", "").isalnum()
    return ascii_name and len(deployment.encode("utf-8", "replace")) <= _MAX_NAME_BYTES
