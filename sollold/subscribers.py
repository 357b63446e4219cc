"""Those who want to hear of the changes of something."""

from __future__ import annotations

import logging
from collections.abc import Callable

log = logging.getLogger("sollold")


class Subscribers:
    """Callbacks of one thing, called on the loop after each of its changes."""

    def __init__(self, what: str) -> None:
        """``what`` changes, for the log."""
        self._what = what
        self._callbacks: dict[object, Callable[[], None]] = {}

    def add(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call ``callback`` from now on; the answer ends that."""
        key = object()
        self._callbacks[key] = callback

        def end() -> None:
            self._callbacks.pop(key, None)

        return end

    def notify(self) -> None:
        """Call them all: one that fails keeps no other from hearing of it."""
        for callback in tuple(self._callbacks.values()):
            try:
                callback()
            except Exception:
                log.exception("handling a change of %s failed", self._what)
