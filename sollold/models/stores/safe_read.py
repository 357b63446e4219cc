"""Reads small untrusted files in a way that can't block or exhaust the daemon."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

MOST = 1 << 18
"""Maximum size of a text file, in bytes."""


def open_file(path: Path) -> BinaryIO:
    """Open a file for reading; without O_NONBLOCK a named pipe would block forever.

    Raises:
        OSError: it can't be opened.
    """
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")


def read_text(path: Path, most: int = MOST) -> str:
    """Return the file's text, cut off after ``most`` bytes; empty if it can't be read."""
    try:
        with open_file(path) as file:
            return file.read(most).decode("utf-8", "replace")
    except OSError:
        return ""
