"""The memory ledger of one node: what is set aside, for whom, until when.

Sans-I/O. Each call takes the time on a monotonic clock of the caller's, in seconds, and gives the answer
together with the actions to carry out. The node is the only writer of its ledger, so two leaders in a
split network can compete for a byte but never both have it.

A grant's life::

    reserve ──► RESERVED ──commit──► COMMITTED ──release / head silent──► ending ──ended──► free
                   └──release / not committed in time──► free

An ending grant still counts: its bytes are free only when the caller says `Ledger.ended`, that is when
the process that used them is dead.

How much one more grant could get on a device is the smallest of

- its limit less what is granted on it,
- the node's limit less what is granted on all devices,
- what is measured free, less the reserve, less what was granted but is not allocated yet, and less what
  others use although it counts as free.

Devices in one pool share the first and the last of these.

The devices of an external worker (`sollold.machine.external_worker`) are no memory of this machine's, so the
node's limit does not count them, and they are one deployment's at a time: a worker serves one client.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from sollold.cluster.gossip.record import Grant, GrantState
from sollold.cluster.gossip.term import Term
from sollold.engines.commands import GRANT_SECONDS, Commit, Done, Release, Renew, Reserve, Reserved
from sollold.facts import dataclass
from sollold.machine.device import Device
from sollold.machine.external_worker import external_address
from sollold.settings.schema import MIB

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
class Changed:
    """Grants are no longer what they were: the record must say so."""


Action = KillWorker | PersistTerm | Changed


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
    """

    def __init__(
        self,
        *,
        term: Term | None = None,
        ready: bool = False,
        node_limit: int = 0,
        reservation_seconds: float = RESERVATION_SECONDS,
        grant_seconds: float = GRANT_SECONDS,
    ) -> None:
        self.term = term or Term()
        self.draining = False
        self._ready = ready
        self._node_limit = node_limit
        self._reserves: dict[str, int] = {}
        self._reservation_seconds = reservation_seconds
        self._grant_seconds = grant_seconds
        self._devices: dict[str, Device] = {}
        self._allocated: dict[str, dict[str, int]] = {}
        self._taken: dict[str, int] = {}
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
        return tuple(
            replace(device, granted=self._granted(device.id), available=self.available(device.id))
            for device in self._devices.values()
        )

    def available(self, device: str) -> int:
        """Bytes that one more grant could get on ``device`` now; 0 for an unknown one."""
        known = self._devices.get(device)
        if known is None:
            return 0
        if self._taken_by(device):
            return 0
        room = min(self._device_room(known), self._pool_room(known))
        return max(0, room if external_address(device) else min(room, self._node_room()))

    def next_deadline(self) -> float | None:
        """When `expire` has something to do; None when nothing can expire."""
        return min((entry.deadline for entry in self._entries.values() if not entry.ending), default=None)

    # Events

    def reconciled(self) -> tuple[Action, ...]:
        """What an earlier run left behind is gone: reservations are taken from now on."""
        self._ready = True
        return (Changed(),)

    def measured(
        self,
        devices: Collection[Device],
        allocated: Mapping[str, Mapping[str, int]] | None = None,
        reserves: Mapping[str, int] | None = None,
        taken: Mapping[str, int] | None = None,
    ) -> tuple[Action, ...]:
        """The devices as they are now.

        ``allocated`` is deployment → device → bytes that its processes had taken when ``free`` was
        measured; what is missing from it counts as not allocated yet. ``reserves`` is device → bytes
        that are left to the rest of the machine. ``taken`` is device → bytes that others than deployments
        use although ``free`` counts them: weights that an Ollama has mapped.
        """
        before = self.devices()
        self._devices = {device.id: device for device in devices}
        self._allocated = {key: dict(value) for key, value in (allocated or {}).items()}
        self._reserves = dict(reserves or {})
        self._taken = dict(taken or {})
        return (Changed(),) if self.devices() != before else ()

    def reserve(self, request: Reserve, now: float) -> tuple[Reserved, tuple[Action, ...]]:
        """Set bytes aside until the commit, all that is asked or nothing.

        The same request again renews the reservation. A request with other bytes replaces an
        uncommitted reservation of the same deployment.
        """
        actions = list(self.expire(now))
        stale = self._see(request.term, actions)
        if stale:
            return self._refused(stale), tuple(actions)
        if not self._ready:
            return self._refused("the node has just started and is still cleaning up"), tuple(actions)
        if not _is_name(request.deployment):
            return self._refused("invalid deployment id: use letters, digits, - and _"), tuple(actions)
        if self.draining:
            return self._refused("the node is draining and accepts no new deployments"), tuple(actions)
        wanted = {device: size for device, size in request.bytes.items() if size}
        if any(size < 0 for size in wanted.values()):
            return self._refused("a negative number of bytes was asked for"), tuple(actions)
        entry = self._entries.get(request.deployment)
        if entry is not None:
            if entry.ending:
                return self._refused(f"deployment {request.deployment} is ending here"), tuple(actions)
            same = entry.head == request.head and entry.bytes == wanted
            if entry.state is GrantState.COMMITTED:
                if not same:
                    return self._refused(f"deployment {request.deployment} is already committed"), tuple(
                        actions
                    )
                return self._reserved(), tuple(actions)
            if same:
                entry.deadline = now + self._reservation_seconds
                return self._reserved(), tuple(actions)
            del self._entries[request.deployment]
        missing = self._missing(wanted)
        if missing:
            if entry is not None:
                self._entries[request.deployment] = entry
            return self._refused(missing), tuple(actions)
        self._entries[request.deployment] = _Entry(
            request.head, wanted, GrantState.RESERVED, now + self._reservation_seconds
        )
        actions.append(Changed())
        return self._reserved(), tuple(actions)

    def commit(self, request: Commit, now: float) -> tuple[Done, tuple[Action, ...]]:
        """The head takes up its reservation. Again: the same answer."""
        actions = list(self.expire(now))
        entry, refusal = self._owned(request.deployment, request.head)
        if entry is None:
            return refusal, tuple(actions)
        absent = sorted(set(request.devices) - set(entry.bytes))
        if absent:
            return Done(False, f"nothing is reserved on {', '.join(absent)} for {request.deployment}"), tuple(
                actions
            )
        entry.deadline = now + self._grant_seconds
        if entry.state is not GrantState.COMMITTED:
            entry.state = GrantState.COMMITTED
            actions.append(Changed())
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
            self._end(request.deployment, "released by " + caller, actions)
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
                self._end(deployment, f"its head {entry.head} did not renew it in time", actions)
        return tuple(actions)

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
        self._allocated.pop(deployment, None)
        return (Changed(),)

    # Inside

    def _see(self, term: Term, actions: list[Action]) -> str:
        if term < self.term:
            return (
                f"the command of {term.leader or 'nobody'} in term {term.counter} is older than term "
                f"{self.term.counter} of {self.term.leader}"
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
            return None, Done(False, f"deployment {deployment} belongs to head {entry.head}")
        return entry, Done(True)

    def _end(self, deployment: str, reason: str, actions: list[Action]) -> None:
        entry = self._entries[deployment]
        if entry.state is GrantState.COMMITTED:
            entry.ending = True
            actions.append(KillWorker(deployment, reason))
        else:
            del self._entries[deployment]
        actions.append(Changed())

    def _reserved(self) -> Reserved:
        return Reserved(True, available={device: self.available(device) for device in self._devices})

    def _refused(self, reason: str) -> Reserved:
        return Reserved(False, reason, {device: self.available(device) for device in self._devices})

    def _granted(self, device: str) -> int:
        return sum(entry.bytes.get(device, 0) for entry in self._entries.values())

    def _members(self, device: Device) -> list[Device]:
        if not device.pool:
            return [device]
        return [other for other in self._devices.values() if other.pool == device.pool]

    def _device_room(self, device: Device) -> int:
        return device.limit - self._granted(device.id)

    def _pool_room(self, device: Device) -> int:
        """What the memory itself has left; the members of a pool are measured as one."""
        members = self._members(device)
        reserve = max(self._reserves.get(member.id, 0) for member in members)
        pledged = 0
        for deployment, entry in self._entries.items():
            taken = self._allocated.get(deployment, {})
            sizes = [(entry.bytes.get(member.id, 0), taken.get(member.id, 0)) for member in members]
            pledged += max(0, sum(granted for granted, _ in sizes) - sum(used for _, used in sizes))
        total = max(member.total for member in members) - sum(self._granted(member.id) for member in members)
        mapped = sum(self._taken.get(member.id, 0) for member in members)
        return min(total, max(member.free for member in members) - reserve - pledged) - mapped

    def _node_room(self) -> int:
        if not self._node_limit:
            return max((device.total for device in self._devices.values()), default=0)
        return self._node_limit - sum(_own(entry.bytes) for entry in self._entries.values())

    def _taken_by(self, device: str) -> str:
        """The deployment that has the external worker behind ``device``; empty when none has."""
        address = external_address(device)
        if not address:
            return ""
        return next(
            (
                deployment
                for deployment, entry in self._entries.items()
                if any(external_address(other) == address for other in entry.bytes)
            ),
            "",
        )

    def _missing(self, wanted: Mapping[str, int]) -> str:
        """Why ``wanted`` can't be had, or empty."""
        for name, size in wanted.items():
            device = self._devices.get(name)
            if device is None:
                return f"there is no device {name} here"
            if other := self._taken_by(name):
                return f"{name} serves one deployment at a time, and {other} has it"
            if size > (room := max(0, self._device_room(device))):
                return (
                    f"{name}: {_mib(size)} asked, {_mib(room)} left under its limit of {_mib(device.limit)}"
                )
            pool = self._members(device)
            together = sum(wanted.get(member.id, 0) for member in pool)
            if together > (room := max(0, self._pool_room(device))):
                return f"{name}: {_mib(together)} asked, {_mib(room)} free"
        if self._node_limit and _own(wanted) > (room := max(0, self._node_room())):
            return (
                f"{_mib(_own(wanted))} asked, {_mib(room)} left under the node's limit of "
                f"{_mib(self._node_limit)}"
            )
        return ""


def _is_name(deployment: str) -> bool:
    """Whether it can name a folder, as it will for logs and tensors: any member may send any text."""
    ascii_name = deployment.replace("-", "").replace("_", "").isalnum()
    return ascii_name and len(deployment.encode("utf-8", "replace")) <= _NAME_BYTES


def _own(sizes: Mapping[str, int]) -> int:
    """Bytes on the machine's own devices."""
    return sum(size for device, size in sizes.items() if not external_address(device))


def _mib(size: int) -> str:
    return f"{size / MIB:,.0f} MiB"
