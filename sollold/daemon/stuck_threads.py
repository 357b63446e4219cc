"""Ends the process even if a thread can't end, such as one reading from an unreachable network share."""

from __future__ import annotations

import logging
import os
import threading

logger = logging.getLogger("sollold")

LONGEST = 20.0
"""Time from the end of the drain, which takes up to 60 s, to the exit, in seconds: systemd kills after 90."""


class StuckThreads:
    """Ends the process, with exit code 0, if its threads do not end by themselves."""

    def __init__(self, seconds: float = LONGEST) -> None:
        self._timer = threading.Timer(seconds, self._exit)
        self._timer.daemon = True

    def expect_end(self) -> None:
        """Start the countdown to the end of the process."""
        if self._timer.is_alive():
            return
        try:
            self._timer.start()
        except RuntimeError as error:
            logger.warning(
                "the daemon may hang at exit if a disk or network share does not respond: %s", error
            )

    def all_ended(self) -> None:
        """Cancel it, the loop having ended, unless a thread is left that Python would wait for."""
        if not _pending_threads():
            self._timer.cancel()

    def _exit(self) -> None:
        names = ", ".join(sorted({thread.name for thread in _pending_threads()})) or "the loop"
        logger.warning(
            "%s did not end: probably a disk or network share does not respond; exiting anyway",
            names,
        )
        for handler in logging.getLogger().handlers:
            handler.flush()
        os._exit(0)


def _pending_threads() -> list[threading.Thread]:
    main = threading.main_thread()
    return [t for t in threading.enumerate() if t is not main and not t.daemon and t.is_alive()]
