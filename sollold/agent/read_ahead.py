"""Files that a worker will read one after the other, brought from the disk into memory shortly before.

A head hashes a tensor, then waits while the worker reads its file, and so on in turns. Read ahead, the file
comes from the disk while the head is hashing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from sollold.settings.schema import MIB

WINDOW = 512 * MIB
"""Bytes ahead of the worker: they take memory that is free anyway, and no more of it."""


class ReadAhead:
    """Begin with `reached` of ``""``.

    Args:
        files: in the order in which they will be read, by any name.
    """

    def __init__(self, files: Mapping[str, Path], window: int = WINDOW) -> None:
        self._files = list(files.items())
        self._places = {name: place for place, (name, _) in enumerate(self._files, 1)}
        self._window = window
        self._sizes: list[int] = []
        """Bytes of those that were looked at so far."""

    def reached(self, name: str) -> None:
        """The worker reads ``name`` now: have the system read what follows. Blocks for a moment."""
        place = self._places.get(name, 0)
        while (at := len(self._sizes)) < len(self._files) and sum(self._sizes[place:]) < self._window:
            size = 0
            with contextlib.suppress(OSError), self._files[at][1].open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if at >= place:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
            self._sizes.append(size)
