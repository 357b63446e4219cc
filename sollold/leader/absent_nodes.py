"""Tracks nodes that left recently and should be back, so that a restart causes no refusal. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from sollold.cluster.gossip.record import Record
from sollold.facts import dataclass

BACK_WITHIN = 60.0
"""Seconds to wait for a node that has just gone: it may restart, or its cable may be plugged in again."""

DRAINED = 5.0
"""Seconds after which a drained node that is still online is assumed to stay drained rather than stop."""

REMEMBERED = 24 * 3600.0
"""Seconds for which an absent node counts as one that could be started again."""

GONE_WITHIN = 15.0
"""Seconds after the drain limit within which a node that is being stopped has ended everything and gone."""


@dataclass(frozen=True, slots=True)
class _Absence:
    record: Record
    since: float
    draining: bool


class Absences:
    """Remembers which nodes are away, and their last records.

    Args:
        leaving: seconds that a drain may take.
    """

    def __init__(self, leaving: float) -> None:
        self._leaving = leaving + GONE_WITHIN
        self._known: dict[str, Record] = {}
        self._away: dict[str, _Absence] = {}
        self._drained: dict[str, float] = {}
        """Nodes that are online, draining and empty, with the time since when."""

    def observe(self, records: Sequence[Record], now: float) -> None:
        """Learn from the records of the live nodes."""
        present = {record.node: record for record in records}
        drained = [record.node for record in records if record.draining and record.empty]
        self._drained = {node: self._drained.get(node, now) for node in drained}
        for record in records:
            if record.build:
                self._known[record.node] = record
                away = self._away.get(record.node)
                returned = away is not None and not away.draining and self._over(away, now)
                if returned or not record.draining:
                    self._away.pop(record.node, None)
        for node, record in list(self._known.items()):
            found = present.get(node)
            if found is not None and found.build and not found.draining:
                continue
            draining = found is not None and found.draining
            absence = self._away.get(node)
            if absence is None or (absence.draining and not draining):
                # The draining node is gone now: from here on it may be restarting.
                self._away[node] = _Absence(record, now, draining)
            elif found is None and now - absence.since >= REMEMBERED:
                del self._known[node], self._away[node]

    def expected(self, now: float) -> tuple[Record, ...]:
        """Return the nodes that should be back soon, as they will then be: with nothing granted."""
        return tuple(
            _empty(absence.record)
            for node, absence in self._away.items()
            if not self._over(absence, now) and now - self._drained.get(node, now) < DRAINED
        )

    def absent(self, now: float) -> tuple[tuple[Record, float], ...]:
        """Return the nodes no longer waited for, as they would be if started, and how long they are away."""
        return tuple(
            (_empty(absence.record), now - absence.since)
            for absence in self._away.values()
            if self._over(absence, now) and not absence.draining and now - absence.since < REMEMBERED
        )

    def _over(self, absence: _Absence, now: float) -> bool:
        return now - absence.since >= (self._leaving if absence.draining else BACK_WITHIN)


def _empty(record: Record) -> Record:
    # Devices that share a device's memory take from it, too.
    granted = Counter[str]()
    for device in record.devices:
        granted[device.memory] += device.granted
    devices = tuple(
        replace(device, granted=0, available=device.available + granted[device.memory])
        for device in record.devices
    )
    return replace(record, draining=False, devices=devices, grants=(), endpoints=())
