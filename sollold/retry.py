"""Loops that continue after an error: it is logged, and the next iteration runs."""

from __future__ import annotations

import logging
from types import TracebackType


class LogAndRetry:
    """A context manager around each iteration of a loop: errors are logged instead of raised.

    Cancellation passes through. An error that repeats is logged once, and its end once.
    """

    def __init__(self, name: str, log: logging.Logger) -> None:
        """``name``: what the loop does, for log lines."""
        self._name = name
        self._log = log
        self._last_error = ""

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None:
            if self._last_error:
                self._log.info("%s works again", self._name)
                self._last_error = ""
            return False
        if not isinstance(error, Exception):
            return False
        described = f"{type(error).__name__}: {error}"
        if described != self._last_error:
            self._last_error = described
            self._log.error("%s failed and will be retried: %s", self._name, described, exc_info=error)
        return True
