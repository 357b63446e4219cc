"""What membership and election must know after a restart (`sollold.cluster.actions.Kept`), on disk."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from sollold.cluster.actions import Kept
from sollold.cluster.state_file import read_bounded, write_whole

log = logging.getLogger("sollold.cluster")

_CLOSE_SECONDS = 3.0
"""A disk that is still busy with the last write after so long is not waited for."""


class KeptFile:
    """The file ``membership.json`` in the state folder. Its methods block for the disk."""

    def __init__(self, state: Path) -> None:
        self._path = state / "membership.json"

    def read(self) -> Kept:
        """What the last run kept; nothing when the file is not there or spoilt (the peers know it)."""
        try:
            return msgspec.json.decode(read_bounded(self._path), type=Kept)
        except FileNotFoundError:
            return Kept()
        except (OSError, msgspec.DecodeError) as error:
            log.warning("%s can't be read, what it held is learned from the peers: %s", self._path, error)
            return Kept()

    def write(self, kept: Kept) -> None:
        """Keep ``kept``.

        Raises:
            OSError: the file can't be written.
        """
        write_whole(self._path, msgspec.json.encode(kept))


class KeptWriter:
    """Writes in the background, one at a time and always the newest; a slow disk keeps nobody waiting.

    A thread of its own: one that the disk holds up must not be missing elsewhere.

    Args:
        written: called on the loop after each write, also after one that failed.
    """

    def __init__(self, file: KeptFile, written: Callable[[Kept], None]) -> None:
        self._file = file
        self._written = written
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kept")
        self._next: Kept | None = None
        self._task: asyncio.Task[None] | None = None

    def write(self, kept: Kept) -> None:
        """Keep ``kept``, unless something newer comes before the disk is ready for it."""
        self._next = kept
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Wait a moment for what is still to be written."""
        if self._task is not None:
            await asyncio.wait([self._task], timeout=_CLOSE_SECONDS)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._thread.shutdown(wait=False)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while (kept := self._next) is not None:
                self._next = None
                try:
                    await loop.run_in_executor(self._thread, self._file.write, kept)
                except OSError as error:
                    # A full disk must not end the cluster: the peers know what this node forgets.
                    log.error("the cluster's state can't be written: %s", error)
                self._written(kept)
        finally:
            self._task = None
