"""Callbacks that are notified when something changes."""

from __future__ import annotations

import logging
from collections.abc import Callable

log = logging.getLogger("sollold")


class Subscribers:
    """The callbacks of one subject, called on the event loop after each change."""

    def __init__(self, subject: str) -> None:
        """``subject``: the subject's name, for the log."""
        self._subject = subject
        self._callbacks: dict[object, Callable[[], None]] = {}

    def add(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call ``callback`` after each change. Returns a function that unsubscribes it."""
        key = object()
        self._callbacks[key] = callback

        def end() -> None:
            self._callbacks.pop(key, None)

        return end

    def notify(self) -> None:
        """Call all callbacks. One that raises is logged and does not affect the others."""
        for callback in tuple(self._callbacks.values()):
            try:
                callback()
            except Exception:
                log.exception("handling a change of %s failed", self._subject)
