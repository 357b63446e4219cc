"""Reads files that a worker is about to read into the page cache.

A head hashes a tensor, then waits while the worker reads its file, and so on in turns. With read-ahead the
next file comes from the disk while the head is hashing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from sollold.settings.schema import MIB

WINDOW = 512 * MIB
"""Bytes to read ahead of the worker: a bound on the page cache used."""


class ReadAhead:
    """Start by calling `reached` with an empty name.

    Args:
        files: name → path, in the order in which they will be read.
    """

    def __init__(self, files: Mapping[str, Path], window: int = WINDOW) -> None:
        self._files = list(files.items())
        self._places = {name: place for place, (name, _) in enumerate(self._files, 1)}
        self._window = window
        self._sizes: list[int] = []
        """Sizes of the files opened so far, in bytes."""

    def reached(self, name: str) -> None:
        """Have the system read what follows ``name``, which the worker reads now. Blocks briefly."""
        place = self._places.get(name, 0)
        while (index := len(self._sizes)) < len(self._files) and sum(self._sizes[place:]) < self._window:
            size = 0
            with contextlib.suppress(OSError), self._files[index][1].open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if index >= place:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
            self._sizes.append(size)
