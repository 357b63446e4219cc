"""How long a suspect has to refute (Lifeguard's dynamic suspicion timeout, arXiv:1707.00788)."""

from __future__ import annotations

from math import log


class Suspicion:
    """A timeout that starts at ``most`` seconds and shrinks to ``least`` as others confirm.

    Args:
        accuser: the first node that suspects it.
        started: start time.
        wanted: confirmations that reduce it to ``least``; 0: it starts there.
    """

    __slots__ = ("_accusers", "_least", "_most", "_slow", "_wanted", "started")

    def __init__(self, accuser: str, started: float, *, least: float, most: float, wanted: int) -> None:
        self._accusers = {accuser}
        self.started = started
        self._least = least
        self._most = most
        self._wanted = wanted
        self._slow = least, most

    @property
    def deadline(self) -> float:
        """Time at which the suspect will be declared dead, as things stand."""
        if self._wanted < 1:
            return self.started + self._least
        share = log(len(self._accusers)) / log(self._wanted + 1)
        return self.started + max(self._least, self._most - share * (self._most - self._least))

    def has(self, accuser: str) -> bool:
        """Whether ``accuser`` has suspected the node."""
        return accuser in self._accusers

    def confirm(self, accuser: str) -> bool:
        """Add an accuser; False if it changes nothing."""
        if accuser in self._accusers or len(self._accusers) > self._wanted:
            return False
        self._accusers.add(accuser)
        return True

    def quicken(self, seconds: float, now: float) -> bool:
        """End in at most ``seconds``, on other evidence of death. False if it ends before that anyway."""
        if now + seconds >= self.deadline:
            return False
        self._least = self._most = max(0.0, now + seconds - self.started)
        return True

    def relax(self) -> None:
        """Restore the normal timeout: the other evidence was wrong."""
        self._least, self._most = self._slow
