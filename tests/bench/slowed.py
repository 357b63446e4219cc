"""Limit a process and its children to a share of one core, with a cgroup quota if possible."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil

PERIOD = 0.03
"""Seconds. Short compared with a token, so that all tokens are slowed equally."""
_CGROUPS = Path("/sys/fs/cgroup")


@contextlib.contextmanager
def slowed(pid: int, share: float) -> Iterator[str]:
    """Let the process and its future children run for ``share`` of the time. Yield the method used."""
    group = _group(f"sollold-bench-{os.getpid()}", share)
    if group is None:
        with _stopped_periodically(pid, share):
            yield "SIGSTOP"
        return
    try:
        (group / "cgroup.procs").write_text(str(pid))
        yield f"quota of {group}"
    finally:
        home = group.parent / "cgroup.procs"
        for member in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):
                home.write_text(member)
        group.rmdir()


def _group(name: str, share: float) -> Path | None:
    """Create a cgroup with the quota (version 1 or 2). Return None if that is impossible."""
    period, quota = f"{PERIOD * 1e6:.0f}", f"{PERIOD * 1e6 * share:.0f}"
    ways = (
        (_CGROUPS / "cpu", (("cpu.cfs_period_us", period), ("cpu.cfs_quota_us", quota))),
        (_CGROUPS, (("cpu.max", f"{quota} {period}"),)),
    )
    for parent, settings in ways:
        group = parent / name
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            for file, value in settings:
                if not (group / file).exists():
                    raise FileNotFoundError(group / file)
                (group / file).write_text(value)
        except OSError:
            group.rmdir()
            continue
        return group
    return None


@contextlib.contextmanager
def _stopped_periodically(pid: int, share: float) -> Iterator[None]:
    end = threading.Event()
    root = psutil.Process(pid)

    def current_members() -> list[int]:
        with contextlib.suppress(psutil.Error):
            return [pid, *(child.pid for child in root.children(recursive=True))]
        return []

    def signal_all(number: int, members: list[int]) -> None:
        for member in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(member, number)

    def beat() -> None:
        count = 0
        members: list[int] = []
        while not end.wait(PERIOD * share):
            if count % 10 == 0:
                members = current_members()
            count += 1
            signal_all(signal.SIGSTOP, members)
            end.wait(PERIOD * (1 - share))
            signal_all(signal.SIGCONT, members)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
        signal_all(signal.SIGCONT, current_members())
