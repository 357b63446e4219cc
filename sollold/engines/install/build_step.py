"""Runs build commands: their output goes to a log, and cancelling the build kills the running one."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

from sollold.errors import system_words
from sollold.machine.child_guard import guarded
from sollold.machine.program import kill_session

_MAX_LINES = 400
_MAX_LINE_BYTES = 16 * 1024
_FAULT = re.compile(
    r"\berror\b[:!]|\bError\b at |CMake Error|fatal error|^ERROR|^fatal:|undefined reference|"
    r"No space left|Killed"
)


class SetupFailed(Exception):
    """llama.cpp could not be set up. The message says which step and line, and what to do."""


class Cancelled(Exception):
    """The set-up was cancelled."""


class Steps:
    """Runs commands one at a time and writes their output to ``log``.

    Args:
        log: the open log file.
        path: path of the log file, for messages.
    """

    def __init__(self, log: BinaryIO, path: Path) -> None:
        self._log = log
        self._path = path
        self._lock = threading.Lock()
        self._running: subprocess.Popen[bytes] | None = None
        self._expired: subprocess.Popen[bytes] | None = None
        self._cancelled = False

    def cancel(self) -> None:
        """Kill the running command and refuse further ones. Thread-safe."""
        with self._lock:
            self._cancelled = True
            self._kill()

    def check(self) -> None:
        """Raise `Cancelled` if `cancel` was called."""
        if self._cancelled:
            raise Cancelled

    def run(
        self,
        step: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        on_line: Callable[[str], None] | None = None,
        timeout: float = 0.0,
    ) -> str:
        """Run ``command`` and return the last lines of its output. ``step`` describes it in messages.

        Raises:
            SetupFailed: it could not be run, failed, or took more than ``timeout`` seconds.
            Cancelled: `cancel` was called.
        """
        self._write(f"\n$ {' '.join(command)}\n")
        with self._lock:
            self.check()
            try:
                popen = self._running = subprocess.Popen(
                    guarded(command),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **(env or {})},
                    start_new_session=True,
                )
            except OSError as error:
                raise SetupFailed(f"{step}: {command[0]} can't be run: {system_words(error)}") from error
        timer = threading.Timer(timeout, self._expire, [popen])
        timer.daemon = True
        if timeout:
            timer.start()
        lines: deque[str] = deque(maxlen=_MAX_LINES)
        try:
            assert popen.stdout is not None
            with popen.stdout:
                for raw in iter(partial(popen.stdout.readline, _MAX_LINE_BYTES), b""):
                    line = raw.decode("utf-8", "replace").rstrip()
                    self._write(line + "\n")
                    lines.append(line)
                    if on_line is not None:
                        on_line(line)
            code = popen.wait()
        finally:
            timer.cancel()
            with self._lock:
                if popen.returncode is None:
                    self._kill()
                    popen.wait()
                self._running = None
        self.check()
        if self._expired is popen:
            raise SetupFailed(f"{step}: timed out after {timeout:.0f} s (full log: {self._path})")
        if code != 0:
            raise SetupFailed(self._failure_message(step, code, lines))
        return "\n".join(lines)

    def _failure_message(self, step: str, code: int, lines: Sequence[str]) -> str:
        rest = iter(lines)
        cause = next((line for line in rest if _FAULT.search(line)), "")
        if cause.endswith("(message):"):  # CMake puts the message on the next line
            cause = next((line for line in rest if line.strip()), cause)
        if not cause:
            cause = next((line for line in reversed(lines) if line.strip()), f"exit code {code}")
        return f"{step} failed: {cause.strip()[:300]} (full log: {self._path})"

    def _expire(self, popen: subprocess.Popen[bytes]) -> None:
        with self._lock:
            if self._running is popen:
                self._expired = popen
                self._write("[timed out]\n")
                self._kill()

    def _kill(self) -> None:
        """Kill the command and its descendants; its session's id is not reused until all are gone."""
        if self._running is not None:
            kill_session(self._running.pid)

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._log.write(text.encode())
            self._log.flush()
