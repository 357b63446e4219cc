"""The key of one ``llama-server``: other users of the machine reach its port, but not its answers.

It is in a file that only the daemon's user can read, since all users can read a command line.
"""

from __future__ import annotations

import contextlib
import secrets
from pathlib import Path

from sollold.settings.state_file import write_whole

_BYTES = 32


class EngineKey:
    """A fresh random key in a file, from `make` to `remove`. Both block for the disk.

    Attributes:
        file: for ``--api-key-file``.
        text: the key.
    """

    def __init__(self, folder: Path, port: int) -> None:
        self.file = folder / f"{port}.key"
        self.text = secrets.token_urlsafe(_BYTES)

    def make(self) -> None:
        """Write the file, readable by its owner alone.

        Raises:
            OSError: it can't be written.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_whole(self.file, self.text.encode() + b"\n")

    def remove(self) -> None:
        """The engine is gone."""
        with contextlib.suppress(OSError):
            self.file.unlink()


def remove_leftovers(folder: Path) -> None:
    """Remove the keys of engines that an earlier run left behind. Call it when those have been ended."""
    with contextlib.suppress(OSError):
        for file in folder.glob("*.key*"):
            file.unlink(missing_ok=True)
