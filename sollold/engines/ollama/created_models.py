"""Names of the models that the daemon created or pulled in this machine's Ollama, so it may delete them."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import msgspec

from sollold.models.names import parse
from sollold.settings.state_file import write_whole
from sollold.undecodable import UNDECODABLE

log = logging.getLogger("sollold.engines")


class CreatedModels:
    """The names, stored on disk. Every call may block: use it off the loop, in any thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()

    def add(self, name: str) -> None:
        """Record that a model was created under this name; invalid names are ignored."""
        self._change(name, add=True)

    def remove(self, name: str) -> None:
        """Record that the model of this name was deleted."""
        self._change(name, add=False)

    def __contains__(self, name: str) -> bool:
        try:
            return parse(name).key in self._read()
        except (OSError, ValueError):
            return False

    def _change(self, name: str, *, add: bool) -> None:
        try:
            # Two pulls may end at the same moment.
            with self._lock:
                names = self._read()
                (names.add if add else names.discard)(parse(name).key)
                write_whole(self._path, msgspec.json.encode(sorted(names)))
        except ValueError:
            pass
        except OSError as error:
            log.warning("can't record in %s that %s was created: %s", self._path, name, error)

    def _read(self) -> set[str]:
        """Return the names; none if the file is missing or damaged.

        Raises:
            OSError: it can't be read now, so it must not be replaced.
        """
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=set[str])
        except (FileNotFoundError, *UNDECODABLE):
            return set()
