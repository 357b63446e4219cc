"""Distinguishes hung engines from slow ones. Pure; the clock is passed in.

A llama-server whose worker hangs still answers ``/health``, but generates no token. Silence alone proves
nothing: a long prompt takes time, and a slow machine is not dead. So the limit depends on the measured speed,
and before it is reached the engine is asked for its progress. An engine without any activity on any node is
detected earlier, by `IdleDetector`. Silence while this daemon itself did not run is not the
engine's: `OwnPauses` discounts it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable

log = logging.getLogger("sollold.serving")

_SLOW_TOKENS = 100
"""Silence that still counts as slow, in tokens at the measured speed."""
_PROMPT_FACTOR = 3.0
"""Factor on the limit before the first token: an engine may process the prompt in one long batch."""


_IDLE_WORK = 0.2
"""Maximum activity per second of idle processes, in the unit of `Process.work` (1/100 s of CPU time)."""
_JITTER = 2.0


class IdleDetector:
    """Measures how long an endpoint has done nothing at all, which means stopped or deadlocked, not slow."""

    def __init__(self) -> None:
        self._since = 0.0
        self._processes = -1
        self._bytes = 0

    def observe(self, processes: int, bytes: int, now: float) -> None:
        """Note the work counters of its processes and tunnels."""
        idle = _JITTER + _IDLE_WORK * (now - self._since)
        if self._processes < 0 or bytes != self._bytes or processes - self._processes > idle:
            self._since, self._processes, self._bytes = now, processes, bytes

    def forget(self) -> None:
        """Forget the last observation: the endpoint's work is unknown."""
        self._processes = -1

    def seconds(self, now: float) -> float:
        """Seconds for which the endpoint has done nothing; 0.0 if unknown."""
        return now - self._since if self._processes >= 0 else 0.0


class RequestProgress:
    """Tracks the progress of one request."""

    def __init__(self, now: float, min_limit: float, speed: float, begin: float = 0.0) -> None:
        """``min_limit``: minimum seconds of silence before a request counts as hung, 0 or less: never hung;
        ``speed``: tokens per second, 0: unknown; ``begin``: minimum seconds granted until the first bytes.
        """
        self._since = now
        self._min_limit = min_limit if min_limit > 0 else math.inf
        self._speed = speed
        self._begin = begin
        self.began = False
        """Whether any bytes have arrived."""
        self._work = -1
        self._unread = False

    def received(self, now: float) -> None:
        """Note that bytes arrived and the caller is not ready for more; it is awaited until `wanted`."""
        self._since = now
        self.began = True
        self._unread = True

    def wanted(self, now: float) -> None:
        """Note that the caller has taken the bytes and wants more."""
        self._since = now
        self._unread = False

    def forwarded(self, now: float) -> None:
        """Note that bytes arrived and the caller took them at once and wants more."""
        self._since = now
        self.began = True
        self._unread = False

    def unread(self, now: float) -> float:
        """Seconds for which the caller has not read the received bytes; 0.0 while the engine is awaited."""
        return now - self._since if self._unread else 0.0

    def worked(self, work: int, now: float) -> None:
        """Note the engine's count of tokens processed and generated in all slots; an increase is progress."""
        if work > self._work >= 0:
            self._since = now
        self._work = work

    def discount(self, seconds: float) -> None:
        """Discount a time for which this daemon did not run."""
        self._since += seconds

    @property
    def limit(self) -> float:
        """Seconds of silence after which the engine counts as hung."""
        limit = max(self._min_limit, _SLOW_TOKENS / self._speed) if self._speed > 0 else self._min_limit
        return limit if self.began else max(limit * _PROMPT_FACTOR, self._begin)

    def silent(self, now: float) -> float:
        """Seconds since the last progress."""
        return now - self._since

    def waited(self, now: float) -> float:
        """Seconds for which the engine has been awaited; 0.0 while the caller is."""
        return 0.0 if self._unread else self.silent(now)

    def doubtful(self, now: float) -> bool:
        """Whether it is time to ask the engine for its progress."""
        return not self._unread and self.silent(now) > self.limit / 4

    def hung(self, now: float) -> bool:
        """Whether the engine has been silent for too long."""
        return not self._unread and self.silent(now) > self.limit


STOOD_STILL = 5.0
"""Seconds between two checks, normally 1 s apart, from which on the daemon counts as paused."""


class OwnPauses:
    """Detects from late checks that the daemon was stopped, or its machine suspended."""

    def __init__(self, now: float) -> None:
        self._last = now

    def rested(self, now: float) -> None:
        """Note that checks were suspended until now, since there was nothing to check."""
        self._last = now

    def check(self, under_way: Iterable[RequestProgress | None], now: float) -> None:
        """If the daemon did not run since the last check, discount that time for all ``under_way``."""
        seconds, self._last = now - self._last, now
        if seconds < STOOD_STILL:
            return
        reason = "it was stopped, or its machine was suspended or overloaded"
        log.warning("this daemon did not run for %.0f s: %s", seconds, reason)
        for progress in under_way:
            if progress is not None:
                progress.discount(seconds)
