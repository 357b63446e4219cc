"""What membership and election must know after a restart (`sollold.cluster.actions.Kept`), on disk."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec

from sollold.cluster.actions import Kept
from sollold.cluster.state_file import read_bounded, write_whole

log = logging.getLogger("sollold.cluster")


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
