"""Logs what happens in the cluster, in a bounded list, by comparing successive states of the records. Pure.

Every node keeps its own log; nothing is sent to others and nothing is stored.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from enum import StrEnum

from sollold.cluster.gossip.record import Endpoint, Record, State
from sollold.cluster.gossip.term import Term
from sollold.facts import dataclass
from sollold.units import bytes_text

MOST_EVENTS = 1000
MOST_OFFLINE = 256
"""Maximum number of remembered offline nodes, so that invented ones can't fill the memory."""


class EventKind(StrEnum):
    """The kind of an event; the values are stable, for programs."""

    NODE_JOINED = "node.joined"
    NODE_LOST = "node.lost"
    NODE_STOPPED = "node.stopped"
    NODE_RETURNED = "node.returned"
    NODE_EVICTED = "node.evicted"
    NODE_REMOVED = "node.removed"
    NODE_DRAINING = "node.draining"
    NODE_DRAINED = "node.drained"
    NODE_UNDRAINED = "node.undrained"
    LEADER_CHANGED = "leader.changed"
    MODEL_LOADING = "model.loading"
    MODEL_LOADED = "model.loaded"
    MODEL_FAILED = "model.failed"
    MODEL_UNLOADED = "model.unloaded"
    MODEL_LOST = "model.lost"
    REQUEST_RESUMED = "request.resumed"


@dataclass(frozen=True, slots=True)
class Event:
    """One event.

    Attributes:
        id: increases by one with every event of this node's log, and is higher after each daemon start.
        time: seconds since the epoch, by this node's clock.
        message: a sentence for people.
        node: id of the node concerned, ``name``: its name; both may be empty.
        deployment: id of the deployment, if the event is about a model.
    """

    id: int
    time: float
    kind: EventKind
    message: str
    node: str = ""
    name: str = ""
    model: str = ""
    deployment: str = ""


@dataclass(frozen=True, slots=True)
class LayersHeld:
    """Layers ``first`` to ``last - 1`` of a model that a node held when it was last seen."""

    model: str
    device: str
    first: int
    last: int
    bytes: int


@dataclass(frozen=True, slots=True)
class OfflineNode:
    """A node that went offline, until it returns or is removed.

    Attributes:
        since: when it was found missing, in seconds since the epoch.
        stopped: whether it announced its departure; otherwise it was lost.
        record: its last record.
        held: layers that it held; ``served``: models that it served.
    """

    since: float
    stopped: bool
    record: Record
    held: tuple[LayersHeld, ...] = ()
    served: tuple[str, ...] = ()


class EventLog:
    """Keeps the newest events, by default the last `MOST_EVENTS`."""

    def __init__(self, most: int = MOST_EVENTS, *, start: int = 0) -> None:
        """``start``: all ids are above it, and must not overlap with those of an earlier log."""
        self._events: deque[Event] = deque(maxlen=most)
        self._next = start + 1
        self.counts: dict[EventKind, int] = {}
        """Number of events of each kind since the start."""

    def add(
        self,
        time: float,
        kind: EventKind,
        message: str,
        *,
        node: str = "",
        name: str = "",
        model: str = "",
        deployment: str = "",
    ) -> Event:
        """Append an event and return it."""
        event = Event(self._next, time, kind, message, node, name, model, deployment)
        self._next += 1
        self._events.append(event)
        self.counts[kind] = self.counts.get(kind, 0) + 1
        return event

    @property
    def newest(self) -> int:
        """Id of the newest event; ``start`` before the first."""
        return self._next - 1

    def after(self, seen: int, limit: int = MOST_EVENTS) -> list[Event]:
        """Return the newest ``limit`` events with an id above ``seen``, the oldest first."""
        found: list[Event] = []
        for event in reversed(self._events):
            if event.id <= seen or len(found) >= limit:
                break
            found.append(event)
        found.reverse()
        return found


_Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class LoadTime:
    """A finished load by this node: its duration in ``seconds``, and whether it succeeded."""

    model: str
    seconds: float
    ok: bool


class ClusterWatcher:
    """Turns states of the cluster into events, and remembers the missing nodes.

    Args:
        log: receives the events.
        me: this node's id.
        stopped: tells whether a missing node announced its departure.
        loaded: called for each finished load on this node.
        evicted: tells whether an admin evicted a missing node.
    """

    def __init__(
        self,
        log: EventLog,
        me: str,
        stopped: Callable[[str], bool],
        loaded: Callable[[LoadTime], None],
        evicted: Callable[[str], bool],
    ) -> None:
        self._log = log
        self._me = me
        self._stopped = stopped
        self._evicted = evicted
        self._loaded = loaded
        self._records: dict[str, Record] = {}
        self._endpoints: dict[_Key, Endpoint] = {}
        self._clock = 0.0
        self._began: dict[_Key, float] = {}
        """Monotonic time at which each load began."""
        self._leader = Term()
        self._offline: dict[str, OfflineNode] = {}

    def offline(self) -> tuple[OfflineNode, ...]:
        """Return the missing nodes, the longest missing first."""
        return tuple(sorted(self._offline.values(), key=lambda n: (n.since, n.record.name)))

    def remove(self, node: str, now: float) -> bool:
        """Forget a missing node (id or name); return False when no such node is missing."""
        for missing in tuple(self._offline.values()):
            if node in (missing.record.node, missing.record.name):
                del self._offline[missing.record.node]
                name = missing.record.name
                message = f"{name} was removed from the list of missing nodes"
                self._log.add(now, EventKind.NODE_REMOVED, message, node=missing.record.node, name=name)
                return True
        return False

    def observe(self, live: Sequence[Record], leader: Term, now: float, clock: float) -> None:
        """Compare with the previous state and log the changes; the first call only records the state.

        ``now``: Unix time; ``clock``: monotonic seconds, since the system's clock may be set during a load.
        """
        self._clock = clock
        first = not self._records
        records = {record.node: record for record in live}
        if not first:
            self._compare_nodes(records, now)
            if leader.leader != self._leader.leader:
                self._log_leader(records, leader, now)
        self._compare_endpoints(records, now, quiet=first)
        self._offline = {node: missing for node, missing in self._offline.items() if not self._evicted(node)}
        self._records = records
        self._leader = leader

    def _compare_nodes(self, records: dict[str, Record], now: float) -> None:
        for node, record in records.items():
            previous = self._records.get(node)
            if previous is None:
                self._log_arrival(record, now)
            elif (record.draining, record.empty) != (previous.draining, previous.empty):
                self._log_drain(previous, record, now)
        for node, record in self._records.items():
            if node not in records:
                self._log_departure(record, now)

    def _log_arrival(self, record: Record, now: float) -> None:
        missing = self._offline.pop(record.node, None)
        if missing is None:
            kind, message = EventKind.NODE_JOINED, f"{record.name} joined"
        else:
            kind, message = EventKind.NODE_RETURNED, f"{record.name} is back"
        self._log.add(now, kind, message, node=record.node, name=record.name)

    def _log_departure(self, record: Record, now: float) -> None:
        if self._evicted(record.node):
            message = f"{record.name} was evicted from the cluster"
            self._log.add(now, EventKind.NODE_EVICTED, message, node=record.node, name=record.name)
            return
        stopped = self._stopped(record.node)
        held = tuple(
            LayersHeld(endpoint.model, placed.device, placed.first, placed.last, placed.bytes)
            for endpoint in self._endpoints.values()
            for placed in endpoint.placed
            if placed.node == record.node
        )
        served = sorted({e.model for (node, _), e in self._endpoints.items() if node == record.node})
        if len(self._offline) >= MOST_OFFLINE:
            del self._offline[min(self._offline.values(), key=lambda missing: missing.since).record.node]
        self._offline[record.node] = OfflineNode(now, stopped, record, held, tuple(served))
        message = f"{record.name} stopped" if stopped else f"{record.name} stopped responding"
        if held:
            models = ", ".join(sorted({layers.model for layers in held}))
            message += f"; it held {bytes_text(sum(layers.bytes for layers in held))} of {models}"
        kind = EventKind.NODE_STOPPED if stopped else EventKind.NODE_LOST
        self._log.add(now, kind, message, node=record.node, name=record.name)

    def _log_drain(self, previous: Record, record: Record, now: float) -> None:
        if record.draining and record.empty:
            kind, message = EventKind.NODE_DRAINED, f"{record.name} is drained; safe to stop"
        elif record.draining and not previous.draining:
            kind, message = EventKind.NODE_DRAINING, f"{record.name} is draining: it takes no new requests"
        elif previous.draining and not record.draining:
            kind, message = EventKind.NODE_UNDRAINED, f"{record.name} takes requests again"
        else:
            return
        self._log.add(now, kind, message, node=record.node, name=record.name)

    def _log_leader(self, records: dict[str, Record], leader: Term, now: float) -> None:
        record = records.get(leader.leader)
        name = record.name if record is not None else leader.leader
        message = f"{name} is the leader (term {leader.counter})" if name else "there is no leader at present"
        self._log.add(now, EventKind.LEADER_CHANGED, message, node=leader.leader, name=name)

    def _compare_endpoints(self, records: dict[str, Record], now: float, *, quiet: bool) -> None:
        found = {
            (record.node, endpoint.id): endpoint
            for record in records.values()
            for endpoint in record.endpoints
            if endpoint.loaded or endpoint.state is not State.READY
        }
        for key, endpoint in found.items():
            previous = self._endpoints.get(key)
            if (previous is None or previous.state is not endpoint.state) and not quiet:
                self._log_state(key, records[key[0]], endpoint, previous, now)
            elif previous is None and endpoint.state in _LOADING:
                self._began[key] = self._clock
        for key, endpoint in self._endpoints.items():
            if key in found:
                continue
            self._began.pop(key, None)
            if endpoint.state is State.FAILED:
                continue
            record = self._records.get(key[0])
            name = record.name if record is not None else key[0]
            if key[0] in records:
                kind, message = EventKind.MODEL_UNLOADED, f"{endpoint.model} was unloaded from {name}"
            else:
                kind, message = EventKind.MODEL_LOST, f"{endpoint.model} was lost with {name}"
            self._add(now, kind, message, key, name, endpoint)
        self._endpoints = found

    def _log_state(
        self, key: _Key, record: Record, endpoint: Endpoint, previous: Endpoint | None, now: float
    ) -> None:
        state = endpoint.state
        if state in _LOADING:
            if previous is not None and previous.state in _LOADING:
                return
            self._began[key] = self._clock
            spread = _machines(endpoint)
            message = f"{endpoint.model} is being loaded by {record.name}{spread}"
            self._add(now, EventKind.MODEL_LOADING, message, key, record.name, endpoint)
            return
        began = self._began.pop(key, None)
        loading = previous is None or previous.state in _LOADING
        if state is State.READY and loading:
            duration = f" after {self._clock - began:.1f} s" if began is not None else ""
            message = f"{endpoint.model} is loaded on {record.name}{duration}"
            self._add(now, EventKind.MODEL_LOADED, message, key, record.name, endpoint)
        elif state is State.FAILED:
            message = f"{endpoint.model} failed on {record.name}: {endpoint.reason}"
            self._add(now, EventKind.MODEL_FAILED, message, key, record.name, endpoint)
        else:
            return
        # An engine that fails later was loaded.
        if key[0] == self._me and (began is not None or (state is State.FAILED and loading)):
            seconds = self._clock - began if began is not None else 0.0
            self._loaded(LoadTime(endpoint.model, seconds, state is State.READY))

    def _add(
        self, now: float, kind: EventKind, message: str, key: _Key, name: str, endpoint: Endpoint
    ) -> None:
        self._log.add(
            now, kind, message, node=key[0], name=name, model=endpoint.model, deployment=endpoint.id
        )


_LOADING = (State.STARTING, State.LOADING)


def _machines(endpoint: Endpoint) -> str:
    count = len({placed.node for placed in endpoint.placed})
    return f", spread over {count} machines" if count > 1 else ""


def as_object(event: Event) -> dict[str, object]:
    """Return an event as a JSON object without empty fields."""
    shown: dict[str, object] = {
        "id": event.id,
        "time": round(event.time, 3),
        "kind": str(event.kind),
        "message": event.message,
    }
    for name in ("node", "name", "model", "deployment"):
        if value := getattr(event, name):
            shown[name] = value
    return shown
