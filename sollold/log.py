"""Where log lines go: the journal with fields under systemd, else a terminal in plain words.

The journal's native protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL): one datagram an entry, ``FIELD=value``
lines, or ``FIELD``, newline, 8 bytes little-endian length, value, newline where the value has newlines.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import socket
import struct
import sys
from typing import Any, TextIO

JOURNAL = "/run/systemd/journal/socket"
FIELDS = ("deployment", "request", "peer", "model")
"""What ``extra=`` may carry; ``SOLLOLD_DEPLOYMENT=`` and so on in the journal."""
REQUEST_FIELDS = (
    *("client", "key", "route", "status", "node", "prompt_tokens", "tokens", "first_token", "seconds"),
    *("resumed", "outcome"),
)
"""What the line of a request carries in the journal besides; its text has them as well."""

_PRIORITY = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


class JournalHandler(logging.Handler):
    """Sends records to journald. Never blocks: a journal that is full or away costs the line."""

    def __init__(self, path: str = JOURNAL) -> None:
        """Connect.

        Raises:
            OSError: there is no journal at ``path``.
        """
        super().__init__()
        self.setFormatter(PlainFormatter())
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self._socket.connect(path)
        except OSError:
            self._socket.close()
            raise
        self._socket.setblocking(False)

    def emit(self, record: logging.LogRecord) -> None:
        """Send one entry."""
        try:
            fields = {
                "MESSAGE": self.format(record),
                "PRIORITY": str(_PRIORITY.get(record.levelno, 6)),
                "SYSLOG_IDENTIFIER": "sollold",
                "LOGGER": record.name,
                "CODE_FILE": record.pathname,
                "CODE_LINE": str(record.lineno),
            }
            for name in (*FIELDS, *REQUEST_FIELDS):
                if (value := getattr(record, name, "")) != "":
                    fields[f"SOLLOLD_{name.upper()}"] = str(value)
            self._socket.send(b"".join(_entry(name, value) for name, value in fields.items()))
        except OSError:
            pass
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
        super().close()


def _entry(name: str, value: str) -> bytes:
    data = value.encode("utf-8", "replace")
    if b"\n" not in data:
        return name.encode() + b"=" + data + b"\n"
    return name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"


def shown(text: str) -> str:
    """``text`` on one line: line breaks and whatever else a terminal obeys are written as escapes."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in text
    )


class _Shown:
    """An argument of a log line, by `shown`."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __str__(self) -> str:
        return shown(str(self._value))

    def __repr__(self) -> str:
        return shown(repr(self._value))


class PlainFormatter(logging.Formatter):
    """Names, paths and errors come from elsewhere: they can't begin a line of their own or colour one."""

    def format(self, record: logging.LogRecord) -> str:
        """The message, its arguments escaped, and the traceback below it if there is one."""
        safe = copy.copy(record)
        if isinstance(record.args, tuple):
            safe.args = tuple(one if isinstance(one, int | float) else _Shown(one) for one in record.args)
        elif record.args:
            safe.args = {name: _Shown(one) for name, one in record.args.items()}
        safe.__dict__["exc_text"] = None  # what another formatter made of the traceback
        return super().format(safe)

    def formatException(self, ei: Any) -> str:
        """The traceback, indented, so that no error's text passes for a line of the log."""
        return "\n".join(f"  {shown(line)}" for line in super().formatException(ei).splitlines())


class TerminalFormatter(PlainFormatter):
    """``12:03:07 cluster: node pc2 joined  (deployment=…)``, the level only where it is worth a look."""

    def __init__(self) -> None:
        super().__init__("%(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """One line, and the traceback below it if there is one."""
        text = super().format(record)
        room = record.name.removeprefix("sollold.").removeprefix("sollold")
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        fields = [f"{name}={shown(str(value))}" for name in FIELDS if (value := getattr(record, name, ""))]
        time = self.formatTime(record, self.datefmt)
        tail = f"  ({' '.join(fields)})" if fields else ""
        return f"{time} {level}{f'{room}: ' if room else ''}{text}{tail}"


def set_up(level: str, stream: TextIO | None = None) -> None:
    """Send all of sollold's log to the journal where stderr leads there, else to ``stream`` (stderr)."""
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
        old.close()
    handler: logging.Handler | None = None
    if stream is None and _is_the_journals():
        try:
            handler = JournalHandler(JOURNAL)
        except OSError:
            handler = None
    if handler is None:
        handler = logging.StreamHandler(stream or sys.stderr)
        handler.setFormatter(TerminalFormatter())
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    set_level(level)


def _is_the_journals() -> bool:
    """Whether what we write to standard error or output would go to the journal (systemd.exec(5)).

    That ``$JOURNAL_STREAM`` is set does not say so: terminals of a desktop that systemd started hand it on.
    """
    for number in (2, 1):
        with contextlib.suppress(OSError):
            found = os.fstat(number)
            if os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}":
                return True
    return False


def set_level(level: str) -> None:
    """Change the level of sollold's own lines; libraries stay at warnings."""
    logging.getLogger("sollold").setLevel(level.upper())
