"""Floor 0: a loop that must go on: what fails in one turn is logged, and the next turn comes all the same."""

from __future__ import annotations

import logging
from types import TracebackType


class Turns:
    """A context manager for each turn of a loop. It lets no error out but a cancellation.

    A fault that goes on is logged once, and once more when it is over.
    """

    def __init__(self, name: str, log: logging.Logger) -> None:
        """``name``: of the loop, for people."""
        self._name = name
        self._log = log
        self._failing = ""

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None:
            if self._failing:
                self._log.info("%s works again", self._name)
                self._failing = ""
            return False
        if not isinstance(error, Exception):
            return False
        said = f"{type(error).__name__}: {error}"
        if said != self._failing:
            self._failing = said
            self._log.error("%s failed and is tried again: %s", self._name, said, exc_info=error)
        return True
