"""Log output: the journal with structured fields under systemd, else plain lines on a terminal.

The journal's native protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL) has one datagram per entry: ``FIELD=value``
lines, or, for values with newlines, ``FIELD``, newline, 8 bytes little-endian length, value, newline.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import sys
from typing import Any, TextIO

JOURNAL = "/run/systemd/journal/socket"
FIELDS = ("deployment", "request", "peer", "model")
"""Keys allowed in ``extra=``; ``SOLLOLD_DEPLOYMENT=`` and so on in the journal."""
REQUEST_FIELDS = (
    *("client", "key", "route", "status", "node", "prompt_tokens", "tokens", "first_token", "seconds"),
    *("resumed", "outcome", "error"),
)
"""Further journal fields of a request's log line; its text contains them as well."""
_JOURNAL_FIELDS = [(name, f"SOLLOLD_{name.upper()}") for name in (*FIELDS, *REQUEST_FIELDS)]

_PRIORITY = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


class JournalHandler(logging.Handler):
    """Sends records to journald. Never blocks: when the journal is full or gone the line is dropped."""

    def __init__(self, path: str) -> None:
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
            for name, field in _JOURNAL_FIELDS:
                if (value := getattr(record, name, "")) != "":
                    fields[field] = str(value)
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
    if "\n" not in value:
        return f"{name}={value}\n".encode("utf-8", "replace")
    data = value.encode("utf-8", "replace")
    return name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"


def shown(text: str) -> str:
    """Return ``text`` on one line, with line breaks and control characters escaped."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in text
    )


class _Escaped:
    """An argument of a log line, escaped by `shown`."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __str__(self) -> str:
        return shown(str(self._value))

    def __repr__(self) -> str:
        return shown(repr(self._value))


class PlainFormatter(logging.Formatter):
    """Escapes arguments, which are untrusted, so that they can't start a new line or colour the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the message with its arguments escaped, followed by the traceback if there is one."""
        args, cached = record.args, record.exc_text
        if isinstance(args, tuple):
            record.args = tuple(arg if isinstance(arg, (int, float)) else _Escaped(arg) for arg in args)
        elif args:
            record.args = {name: _Escaped(arg) for name, arg in args.items()}
        record.exc_text = None  # Cached by another formatter.
        try:
            return super().format(record)
        finally:
            # Other handlers get the same record; a copy would take longer than everything else.
            record.args, record.exc_text = args, cached

    def formatException(self, ei: Any) -> str:
        """Return the traceback, indented so that no exception text can pass for a log line."""
        return "\n".join(f"  {shown(line)}" for line in super().formatException(ei).splitlines())


class TerminalFormatter(PlainFormatter):
    """Formats ``12:03:07 cluster: node pc2 joined  (deployment=…)``; the level appears from WARNING up."""

    def __init__(self) -> None:
        super().__init__("%(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """Return one line, followed by the traceback if there is one."""
        text = super().format(record)
        module = record.name.removeprefix("sollold.").removeprefix("sollold")
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        fields = [f"{name}={shown(str(value))}" for name in FIELDS if (value := getattr(record, name, ""))]
        time = self.formatTime(record, self.datefmt)
        tail = f"  ({' '.join(fields)})" if fields else ""
        return f"{time} {level}{f'{module}: ' if module else ''}{text}{tail}"


def set_up(level: str, stream: TextIO | None = None) -> None:
    """Send sollold's log to ``stream``; None: to the journal if our output goes there, else to stderr."""
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
        old.close()
    handler: logging.Handler | None = None
    if stream is None and _logs_to_journal():
        try:
            handler = JournalHandler(JOURNAL)
        except OSError:
            handler = None
    if handler is None:
        handler = logging.StreamHandler(stream or sys.stderr)
        handler.setFormatter(TerminalFormatter())
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    # It warns of each socket when an address disappears, which the daemon's own lines already tell.
    logging.getLogger("zeroconf").setLevel(logging.ERROR)
    # No line shows them, and each record would look them up.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    set_level(level)


def _logs_to_journal() -> bool:
    """Return whether our standard error or output is connected to the journal (systemd.exec(5)).

    ``$JOURNAL_STREAM`` alone proves nothing: terminals of a desktop session started by systemd inherit it.
    """
    for number in (2, 1):
        with contextlib.suppress(OSError):
            found = os.fstat(number)
            if os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}":
                return True
    return False


def set_level(level: str) -> None:
    """Change the level of sollold's own loggers; libraries stay at WARNING."""
    logging.getLogger("sollold").setLevel(level.upper())
