"""The API key of a ``llama-server``: other users of the machine can reach its port, but not use it.

The key is in a file that only the daemon's user can read, since all users can read command lines.
"""

from __future__ import annotations

import contextlib
import secrets
from pathlib import Path

from sollold.settings.state_file import write_whole

_BYTES = 32


class EngineKey:
    """A random key in a file, from `make` to `remove`. Both block on the disk.

    Attributes:
        file: path for ``--api-key-file``.
        text: the key.
    """

    def __init__(self, folder: Path, port: int) -> None:
        self.file = folder / f"{port}.key"
        self.text = secrets.token_urlsafe(_BYTES)

    def make(self) -> None:
        """Write the file, readable only by its owner.

        Raises:
            OSError: the file can't be written.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_whole(self.file, self.text.encode() + b"\n")

    def remove(self) -> None:
        """Delete the file."""
        with contextlib.suppress(OSError):
            self.file.unlink()


def remove_leftovers(folder: Path) -> None:
    """Delete the key files of an earlier run. Call it once that run's engines have ended."""
    with contextlib.suppress(OSError):
        for file in folder.glob("*.key*"):
            file.unlink(missing_ok=True)
