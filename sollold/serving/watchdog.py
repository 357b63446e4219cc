"""Telling a hung engine from a slow one. Pure; clock passed in.

A llama-server whose worker hangs answers ``/health`` and makes no token. Silence alone proves nothing:
a long prompt takes its time, and a slow machine is not a dead one. So the limit follows the speed that was
measured, and before it is applied the engine's own account of its work is asked for. An engine none of whose
processes, on any node, does anything is another matter: `IdleDetector` tells it early. And silence while this
daemon itself did not run is none of an engine's: `OwnPauses` takes it off.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable

log = logging.getLogger("sollold.serving")

_TOKENS = 100
"""Tokens' worth of silence at the measured speed that are taken as slow still."""
_PROMPT = 3.0
"""While the prompt is read an engine may be in one long batch and answer nothing: so much longer."""


_IDLE = 0.2
"""What processes do each second that wait for work, in hundredths of a second of a processor."""
_JITTER = 2.0


class IdleDetector:
    """Since when an endpoint has done nothing at all: it is stopped or locked, however slow it may be."""

    def __init__(self) -> None:
        self._since = 0.0
        self._processes = -1
        self._bytes = 0

    def observe(self, processes: int, bytes: int, now: float) -> None:
        """What its processes and tunnels have done so far."""
        idle = _JITTER + _IDLE * (now - self._since)
        if self._processes < 0 or bytes != self._bytes or processes - self._processes > idle:
            self._since, self._processes, self._bytes = now, processes, bytes

    def forget(self) -> None:
        """Nothing is known of it."""
        self._processes = -1

    def seconds(self, now: float) -> float:
        """For how long it has done nothing; 0.0 when that is not known."""
        return now - self._since if self._processes >= 0 else 0.0


class RequestProgress:
    """One request's signs of life."""

    def __init__(self, now: float, least: float, speed: float, begin: float = 0.0) -> None:
        """``least``: seconds of silence that are always granted, 0 or less: all there are; ``speed``: tokens
        per second, 0 unknown; ``begin``: seconds granted until the first bytes, at the least.
        """
        self._since = now
        self._least = least if least > 0 else math.inf
        self._speed = speed
        self._begin = begin
        self.began = False
        """Whether any bytes came."""
        self._work = -1
        self._unread = False

    def came(self, now: float) -> None:
        """Bytes came, and are being passed on: until `wanted` the silence is the caller's."""
        self._since = now
        self.began = True
        self._unread = True

    def wanted(self, now: float) -> None:
        """The caller took them and wants more."""
        self._since = now
        self._unread = False

    def passed(self, now: float) -> None:
        """Bytes came, and the caller took them at once and wants more."""
        self._since = now
        self.began = True
        self._unread = False

    def unread(self, now: float) -> float:
        """Seconds for which the caller has not taken what came; 0.0 while the engine is waited for."""
        return now - self._since if self._unread else 0.0

    def worked(self, work: int, now: float) -> None:
        """The engine's own account: tokens read and made so far by all its slots. More work is progress."""
        if work > self._work >= 0:
            self._since = now
        self._work = work

    def stood_still(self, seconds: float) -> None:
        """This daemon did not run for so long: that silence was its own, not the engine's."""
        self._since += seconds

    @property
    def limit(self) -> float:
        """Seconds of silence after which the engine is taken for hung."""
        limit = max(self._least, _TOKENS / self._speed) if self._speed > 0 else self._least
        return limit if self.began else max(limit * _PROMPT, self._begin)

    def silent(self, now: float) -> float:
        """Seconds since the last sign of life."""
        return now - self._since

    def waited(self, now: float) -> float:
        """Seconds for which the engine has been waited for; 0.0 while the caller is."""
        return 0.0 if self._unread else self.silent(now)

    def doubtful(self, now: float) -> bool:
        """Whether it is time to ask the engine what it has done."""
        return not self._unread and self.silent(now) > self.limit / 4

    def hung(self, now: float) -> bool:
        """Whether the silence has lasted too long."""
        return not self._unread and self.silent(now) > self.limit


STOOD_STILL = 5.0
"""Seconds between two checks, of which there is one a second, from which a daemon did not run."""


class OwnPauses:
    """Notices by its own checks coming late that a daemon was stopped, or its machine suspended."""

    def __init__(self, now: float) -> None:
        self._last = now

    def rested(self, now: float) -> None:
        """There was nothing to check until now."""
        self._last = now

    def check(self, under_way: Iterable[RequestProgress | None], now: float) -> None:
        """Where it did not run since the last check, give what was ``under_way`` that time back."""
        seconds, self._last = now - self._last, now
        if seconds < STOOD_STILL:
            return
        why = "it was stopped, or its machine was suspended or overloaded"
        log.warning("this daemon did not run for %.0f s: %s", seconds, why)
        for progress in under_way:
            if progress is not None:
                progress.stood_still(seconds)
