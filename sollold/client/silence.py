"""Tells a node that works on a long request from one that hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

HEALTH_SECONDS = 2.0
"""Timeout of the question whether a silent node works."""
HUNG_SECONDS = 30.0
"""Seconds without any response after which a node counts as hung."""
_SILENT_SECONDS = 3.0
"""Seconds of silence before that question is asked, and between two of them."""


class SilenceWatch(threading.Thread):
    """Watches one request from a thread of its own, until `end`.

    A request may be silent for minutes, for example while a model loads. A node that hangs answers nothing at
    all, so it is asked beside the request whether it works.

    Args:
        works: asks the node, for at most `HEALTH_SECONDS`; False if it does not respond.
        warn: called once when the node has stopped responding.
        abort: ends the request; called after `HUNG_SECONDS`, with ``hung`` set.
    """

    def __init__(
        self, works: Callable[[], bool], warn: Callable[[], None], abort: Callable[[], None]
    ) -> None:
        super().__init__(name="silence-watch", daemon=True)
        self.hung = False
        self._works = works
        self._warn = warn
        self._abort = abort
        self._heard = time.monotonic()
        self._over = threading.Event()

    def heard(self) -> None:
        """Note that something of the response has arrived."""
        self._heard = time.monotonic()

    def end(self) -> None:
        """Stop watching."""
        self._over.set()

    def run(self) -> None:
        """Watch until the end of the request."""
        warned = False
        while not self._over.wait(_SILENT_SECONDS):
            if time.monotonic() - self._heard < _SILENT_SECONDS:
                continue
            if self._works():
                self.heard()
            elif self._over.is_set():
                return
            elif time.monotonic() - self._heard >= HUNG_SECONDS:
                self.hung = True
                self._abort()
                return
            elif not warned:
                warned = True
                self._warn()
