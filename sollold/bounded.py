"""A dictionary of limited size, for caches and histories."""

from __future__ import annotations

from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


class BoundedDict(dict[K, V]):
    """Keeps the entries set last, oldest first. Set entries by ``[]`` only."""

    def __init__(self, limit: int) -> None:
        """``limit``: maximum number of entries."""
        super().__init__()
        self._limit = limit

    def __setitem__(self, key: K, value: V) -> None:
        self.pop(key, None)
        super().__setitem__(key, value)
        if len(self) > self._limit:
            del self[next(iter(self))]
