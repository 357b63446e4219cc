"""Runs a short-lived program and returns its output."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil


def run_program(
    command: Sequence[str | Path],
    timeout: float,
    *,
    env: Mapping[str, str] | None = None,
    with_errors: bool = True,
) -> subprocess.CompletedProcess[bytes]:
    """Run ``command`` without input, and return its exit status and output. Call it off the loop.

    It may be a script that runs the actual program: after ``timeout`` seconds all its processes are killed.

    Args:
        command: the program and its arguments.
        timeout: limit in seconds.
        env: added to `child_environment`.
        with_errors: the output includes that to stderr, which otherwise is discarded.

    Raises:
        OSError: it can't be run.
        subprocess.TimeoutExpired: it took too long.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if with_errors else subprocess.DEVNULL,
        env={**child_environment(), **(env or {})},
        start_new_session=True,
    )
    with process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except BaseException:
            kill_session(process.pid)
            raise
    return subprocess.CompletedProcess(command, process.returncode, output)


def child_environment() -> dict[str, str]:
    """Return this process's environment without variables that would silently set llama.cpp's options, even
    those for a program that only prints its version, and without our secrets and systemd's sockets."""
    unwanted = ("LLAMA_", "SOLLOLD_", "NOTIFY_SOCKET", "WATCHDOG_", "LISTEN_")
    return {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}


def kill_session(leader: int) -> None:
    """Kill a process that began a session and was not waited for yet, and its descendants in that session.

    Its process group is not enough: ninja and shells put what they run into groups of their own. Blocks for
    milliseconds.
    """
    killed: set[int] = set()
    # They may start others until they are killed.
    while found := session_members(leader) - killed:
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        killed |= found


def session_members(leader: int) -> set[int]:
    """Return the ids of the processes in the session that ``leader`` began. Blocks for milliseconds."""
    return {pid for pid in psutil.pids() if in_session(pid, leader)}


def in_session(pid: int, leader: int) -> bool:
    """Return whether a process is in the session that ``leader`` began."""
    try:
        return os.getsid(pid) == leader
    except (ProcessLookupError, PermissionError):
        return False
