"""Machines that ask to be admitted, and those of them approved by an admin."""

from __future__ import annotations

from sollold.cluster.gossip.record import WaitingMachine
from sollold.cluster.net.acceptor import is_crowded
from sollold.facts import dataclass

_MAX_WAITING = 64
_MAX_PER_ADDRESS = 4
"""One machine can present any number of keys: it must not crowd out the others."""
_WAITING_SECONDS = 30.0
"""Seconds without a request after which a machine is dropped."""
_APPROVED_SECONDS = 600.0


@dataclass(slots=True)
class _Stranger:
    shown: WaitingMachine
    asked: float
    address: str


class WaitingList:
    """The waiting machines. Times are on the monotonic clock. Pure."""

    def __init__(self) -> None:
        self._strangers: dict[str, _Stranger] = {}
        self._approved: dict[str, float] = {}

    @property
    def shown(self) -> tuple[WaitingMachine, ...]:
        """All waiting machines, as in the record."""
        return tuple(stranger.shown for stranger in self._strangers.values())

    def add(self, machine: WaitingMachine, address: str, now: float) -> bool:
        """Note a request from ``address``; True if it is new. Too many at a time are ignored."""
        new = machine.node not in self._strangers
        others = (stranger.address for stranger in self._strangers.values())
        if new and is_crowded(address, others, _MAX_PER_ADDRESS, _MAX_WAITING):
            return False
        self._strangers[machine.node] = _Stranger(machine, now, address)
        return new

    def approve(self, node: str, now: float) -> bool:
        """Approve a machine; False if it is not waiting."""
        if node in self._strangers:
            self._approved[node] = now + _APPROVED_SECONDS
        return node in self._strangers

    def approved(self, node: str, now: float) -> bool:
        """Whether an admin approved it recently."""
        return self._approved.get(node, 0.0) > now

    def remove(self, node: str) -> None:
        """Remove a machine."""
        self._strangers.pop(node, None)
        self._approved.pop(node, None)

    def clear(self) -> None:
        """Remove all waiting machines, and their approvals."""
        self._strangers.clear()
        self._approved.clear()

    def forget(self, now: float) -> bool:
        """Drop machines that have not asked for long; True if there were any."""
        gone = [node for node, stranger in self._strangers.items() if stranger.asked < now - _WAITING_SECONDS]
        for node in gone:
            del self._strangers[node]
        self._approved = {node: until for node, until in self._approved.items() if until > now}
        return bool(gone)
