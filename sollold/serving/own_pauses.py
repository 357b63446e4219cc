"""Times in which this daemon itself did not run: engines are not to be ended for silence that was its own."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from sollold.serving.watchdog import RequestProgress

log = logging.getLogger("sollold.serving")

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
