"""Standard input and output as they come: a locale without our signs, a text that is not the locale's."""

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
    """Without what a terminal obeys: names and reasons come from other machines, of an open cluster any."""
    return text.translate(_CONTROLS)


def forgive() -> None:
    """No letter that can't be read or written ends a command: one like it, or a question mark, is taken."""
    codecs.register_error(_NAME, _plain)
    # Who starts a program with them closed (`>&-`) has None there.
    sys.stdin = sys.stdin or _nowhere("r")
    sys.stdout = sys.stdout or _nowhere("w")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=_NAME)


def _nowhere(mode: Literal["r", "w"]) -> TextIO:
    return Path(os.devnull).open(mode)


def forget_output() -> None:
    """Nobody takes it any more: what is still in the buffer goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(_PLAIN.get(letter, "?") for letter in letters), error.end
