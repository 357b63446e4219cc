"""One node id and two processes that live: a state folder was copied to another machine.

A process that was followed by another never speaks again. If one does, and again and again, both live, and
each takes what is said of the other for an old word that it must refute. So all nodes keep the one that
started first, as the numbers of the processes tell, and listen to the other no more.
"""

from __future__ import annotations

from collections import deque

from sollold.cluster.gossip.actions import Address
from sollold.facts import dataclass

_RETURNS = 3
"""Returns of a process that another had followed. One or two are gossip that comes late."""
_MOST = 8
_SILENT = 60.0
"""Seconds of silence of the process that is kept, after which the other is listened to again."""
_CURRENT = 180.0
"""Seconds without a word of the other one, after which it is taken to be gone."""
_TELL_PAUSE = 0.5
_LATE = 3.0
"""Seconds for which datagrams of a process that ended may still be on their way."""
_CHANCE_BITS = 32
_EPOCH = 1_577_836_800
"""The year 2020, in Unix time."""


def boot_number(started: float, chance: int) -> int:
    """A number for a process that starts at this Unix time, greater than those of earlier seconds.

    ``chance``: random bits, which keep it from being any other's; it is odd, below 2**63.
    """
    seconds = min(max(0, int(started - _EPOCH)), (1 << 30) - 1)
    return seconds << _CHANCE_BITS | chance % (1 << _CHANCE_BITS) | 1


@dataclass(frozen=True, slots=True)
class Double:
    """A node id that two machines use: where the one is that takes part, and the other."""

    node: str
    kept: str
    other: str

    @property
    def machines(self) -> str:
        """Which both are, to be put behind a sentence; empty where that is not known."""
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
    """The processes that spoke in the name of one node."""

    __slots__ = ("_barred", "_followed", "_former", "_returns")

    def __init__(self) -> None:
        self._former: deque[int] = deque(maxlen=_MOST)
        self._followed = 0.0
        self._returns = 0
        self._barred: dict[int, _Barred] = {}

    def barred(self, boot: int) -> bool:
        """Whether this one is not listened to."""
        return boot in self._barred

    def forget(self, boot: int) -> None:
        """Listen to this one again: nobody else is there."""
        self._barred.pop(boot, None)

    def follows(
        self, boot: int, said: int, hosts: tuple[Address, ...], said_hosts: tuple[Address, ...], now: float
    ) -> bool:
        """Whether the process ``said`` takes the place of ``boot``, which is held alive: it said so anew."""
        if said in self._barred:
            return False
        self._returns = self._returns + 1 if said in self._former else 0
        if self._returns >= _RETURNS:
            self._part(boot, said, hosts, said_hosts, now)
            if said in self._barred:
                return False
        if boot not in self._former:
            self._former.append(boot)
        self._followed = now
        return True

    def hear(
        self,
        boot: int,
        other: int,
        source: Address | None,
        hosts: tuple[Address, ...],
        heard: float,
        now: float,
    ) -> bool:
        """The process ``other`` speaks, which is not the one that counts, ``boot``.

        ``heard``: when that last did. True: now it is clear that both live.
        """
        one = self._barred.get(other)
        if one is None:
            if other not in self._former or now - self._followed < _LATE or source is None:
                return False
            self._part(boot, other, hosts, (source,), now)
            return True
        if now - max(heard, one.since) > _SILENT:
            del self._barred[other]
            return False
        one.heard = now
        if source is not None and not one.host:
            one.host = source[0]
        return False

    def _part(
        self, boot: int, other: int, hosts: tuple[Address, ...], others: tuple[Address, ...], now: float
    ) -> None:
        """Bar the one of the two that started later."""
        barred, where = (other, others) if boot < other else (boot, hosts)
        if len(self._barred) < _MOST:
            self._barred[barred] = _Barred(where[0][0] if where else "", now)

    def tells(self, boot: int, now: float) -> bool:
        """Whether the process that is kept is to hear what this one says: it refutes that, and so both
        learn that there are two."""
        one = self._barred.get(boot)
        if one is None or now - one.told < _TELL_PAUSE:
            return False
        one.told = now
        return True

    def other(self, now: float) -> str | None:
        """Where the other one is; None when there is none, or it is gone."""
        current = [one for one in self._barred.values() if now - one.heard < _CURRENT]
        return max(current, key=lambda one: one.heard).host if current else None
