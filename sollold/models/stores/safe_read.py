"""Small files of others, read so that nothing they may be can hold us."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import msgspec

UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding the JSON of others may raise."""
MOST = 1 << 18
"""Bytes of a text, at the most."""


def open_file(path: Path) -> BinaryIO:
    """Open it for reading; without O_NONBLOCK a named pipe would hold us for ever.

    Raises:
        OSError: it can't be opened.
    """
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")


def read_text(path: Path, most: int = MOST) -> str:
    """Its text, cut after ``most`` bytes; empty when it can't be read."""
    try:
        with open_file(path) as file:
            return file.read(most).decode("utf-8", "replace")
    except OSError:
        return ""
