"""Detects two live processes with the same node id: a state folder was copied to another machine.

A process that was replaced by a restart never sends again. If one does so repeatedly, both are alive, and
each takes statements about the other for outdated ones that it must refute. So all nodes keep the process
that started first, according to the boot numbers, and ignore the other.
"""

from __future__ import annotations

from collections import deque

from sollold.cluster.gossip.actions import Address
from sollold.facts import dataclass

_MIN_RETURNS = 3
"""Times that a replaced process has to return before it counts as alive. One or two are delayed gossip."""
_MAX_PROCESSES = 8
_SILENT_SECONDS = 60.0
"""Seconds of silence of the kept process after which the other is accepted again."""
_CURRENT_SECONDS = 180.0
"""Seconds without any message of the other process after which it is considered gone."""
_TELL_PAUSE = 0.5
_CHANCE_BITS = 32
_EPOCH = 1_577_836_800
"""The year 2020, in Unix time."""


def boot_number(started: float, chance: int) -> int:
    """Return a boot number for a process started at this Unix time, greater than those of earlier seconds.

    ``chance``: random bits that make it unique. The number is odd and below 2**62.
    """
    seconds = min(max(0, int(started - _EPOCH)), (1 << 30) - 1)
    return seconds << _CHANCE_BITS | chance % (1 << _CHANCE_BITS) | 1


@dataclass(frozen=True, slots=True)
class Double:
    """A node id used by two machines: host of the one that takes part, and of the other."""

    node: str
    kept: str
    other: str

    @property
    def machines(self) -> str:
        """Both hosts as the end of a sentence; empty if either is unknown."""
        if not self.kept or not self.other:
            return ""
        return f": {self.kept}, which takes part in the cluster, and {self.other}, which does not"


class _Barred:
    __slots__ = ("heard", "host", "since", "told")

    def __init__(self, host: str, now: float) -> None:
        self.host = host
        self.since = self.heard = now
        self.told = float("-inf")


class Processes:
    """The processes that have used one node's id."""

    __slots__ = ("_barred", "_former", "_returns")

    def __init__(self) -> None:
        self._former: deque[int] = deque(maxlen=_MAX_PROCESSES)
        self._returns = 0
        self._barred: dict[int, _Barred] = {}

    def barred(self, boot: int) -> bool:
        """Whether messages of this process are ignored."""
        return boot in self._barred

    def forget(self, boot: int) -> None:
        """Accept this process again: no other is alive."""
        self._barred.pop(boot, None)

    def follows(
        self, boot: int, new_boot: int, hosts: tuple[Address, ...], new_hosts: tuple[Address, ...], now: float
    ) -> bool:
        """Whether process ``new_boot``, just announced, replaces ``boot``, which is considered alive."""
        if new_boot in self._barred:
            return False
        self._returns = self._returns + 1 if new_boot in self._former else 0
        if self._returns >= _MIN_RETURNS:
            self._bar(boot, new_boot, hosts, new_hosts, now)
            if new_boot in self._barred:
                return False
        if boot not in self._former:
            self._former.append(boot)
        return True

    def hear(self, other: int, source: Address | None, heard: float, now: float) -> None:
        """Note a message of process ``other``, which is not the one that counts.

        ``heard``: when that one was last heard. A datagram does not prove that ``other`` lives: any member
        can send one in its name. Only its signed statements do, see `follows`.
        """
        entry = self._barred.get(other)
        if entry is None:
            return
        if now - max(heard, entry.since) > _SILENT_SECONDS:
            del self._barred[other]
            return
        entry.heard = now
        if source is not None and not entry.host:
            entry.host = source[0]

    def _bar(
        self, boot: int, other: int, hosts: tuple[Address, ...], others: tuple[Address, ...], now: float
    ) -> None:
        """Ignore the process that started later."""
        barred, barred_hosts = (other, others) if boot < other else (boot, hosts)
        if len(self._barred) < _MAX_PROCESSES:
            self._barred[barred] = _Barred(barred_hosts[0][0] if barred_hosts else "", now)

    def tells(self, boot: int, now: float) -> bool:
        """Whether to forward this process' statement to the kept one, which refutes it, so that both learn of
        each other. Rate limited.
        """
        entry = self._barred.get(boot)
        if entry is None or now - entry.told < _TELL_PAUSE:
            return False
        entry.told = now
        return True

    def other(self, now: float) -> str | None:
        """Return the other process' host; None if there is none or it is gone."""
        current = [entry for entry in self._barred.values() if now - entry.heard < _CURRENT_SECONDS]
        return max(current, key=lambda entry: entry.heard).host if current else None
