"""Standard streams in any locale: characters that can't be encoded or decoded are replaced."""

from __future__ import annotations

import codecs
import io
import os
import sys
from pathlib import Path
from typing import Literal, TextIO

_PLAIN = {"█": "#", "▓": "+", "▒": "=", "░": "-", "·": ".", "…": "...", "→": "->", "–": "-", "’": "'"}
_NAME = "sollold-plain"


_CONTROLS = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}


def harmless(text: str) -> str:
    """Remove control characters: names and reasons come from other machines, possibly hostile ones."""
    return text.translate(_CONTROLS)


def forgive() -> None:
    """Replace characters that can't be read or written, instead of failing."""
    codecs.register_error(_NAME, _plain)
    # They are None if the program was started with them closed (`>&-`).
    sys.stdin = sys.stdin or _null("r")
    sys.stdout = sys.stdout or _null("w")
    # Without one, `print` would write messages to standard output.
    sys.stderr = sys.stderr or _null("w")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=_NAME)


def _null(mode: Literal["r", "w"]) -> TextIO:
    return Path(os.devnull).open(mode)


def forget_output() -> None:
    """Discard buffered output, since its reader has gone."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(_PLAIN.get(letter, "?") for letter in letters), error.end
