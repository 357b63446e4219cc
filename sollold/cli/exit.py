"""Exit statuses; `sollold --help` lists them."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """Exit statuses of commands."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    NO_MODEL = 4
    TOO_BIG = 5

    @classmethod
    def of(cls, status: int) -> Exit:
        """The exit status for an HTTP status; 0: no response."""
        return {0: cls.UNREACHABLE, 404: cls.NO_MODEL, 507: cls.TOO_BIG}.get(status, cls.FAILED)
