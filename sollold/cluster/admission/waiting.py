"""Machines that asked to be admitted and were not, and those of them that an admin approved since."""

from __future__ import annotations

from sollold.cluster.gossip.record import WaitingMachine
from sollold.cluster.net.acceptor import is_loopback
from sollold.facts import dataclass

_MOST = 64
_PER_ADDRESS = 4
"""One machine can show any number of keys: it must not keep the others from being shown."""
_WAITING_SECONDS = 30.0
"""A machine that has not asked again for so long waits no more."""
_APPROVED_SECONDS = 600.0


@dataclass(slots=True)
class _Stranger:
    shown: WaitingMachine
    asked: float
    address: str


class WaitingList:
    """The machines that wait. Times are on the monotonic clock. Pure."""

    def __init__(self) -> None:
        self._strangers: dict[str, _Stranger] = {}
        self._approved: dict[str, float] = {}

    @property
    def shown(self) -> tuple[WaitingMachine, ...]:
        """All that wait, as the record tells of them."""
        return tuple(one.shown for one in self._strangers.values())

    def add(self, one: WaitingMachine, address: str, now: float) -> bool:
        """It asked from ``address``; whether it is new. Too many at a time are not shown."""
        new = one.node not in self._strangers
        alike = sum(other.address == address for other in self._strangers.values())
        crowd = alike >= _PER_ADDRESS and not is_loopback(address)
        if new and (len(self._strangers) >= _MOST or crowd):
            return False
        self._strangers[one.node] = _Stranger(one, now, address)
        return new

    def approve(self, node: str, now: float) -> bool:
        """An admin approves a machine; False when it does not wait."""
        if node in self._strangers:
            self._approved[node] = now + _APPROVED_SECONDS
        return node in self._strangers

    def approved(self, node: str, now: float) -> bool:
        """Whether an admin approved it, a short while ago."""
        return self._approved.get(node, 0.0) > now

    def remove(self, node: str) -> None:
        """It waits no more."""
        self._strangers.pop(node, None)
        self._approved.pop(node, None)

    def clear(self) -> None:
        """Send away all that wait."""
        self._strangers.clear()

    def forget(self, now: float) -> bool:
        """Drop those that have not asked for long; whether there were any."""
        gone = [node for node, one in self._strangers.items() if one.asked < now - _WAITING_SECONDS]
        for node in gone:
            del self._strangers[node]
        self._approved = {node: until for node, until in self._approved.items() if until > now}
        return bool(gone)
