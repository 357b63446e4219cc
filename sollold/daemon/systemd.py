"""Reports the daemon's state to systemd, sd_notify(3): datagrams of ``KEY=value`` to ``$NOTIFY_SOCKET``."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable

from sollold.retry import LogAndRetry

STATUS_SECONDS = 5.0
"""Maximum age of the status line, in seconds."""


def notify(*, ready: bool = False, stopping: bool = False, watchdog: bool = False, status: str = "") -> bool:
    """Notify systemd; return False if not started by systemd, or if it is not listening just now."""
    lines = []
    if ready:
        lines.append("READY=1")
    if stopping:
        lines.append("STOPPING=1")
    if watchdog:
        lines.append("WATCHDOG=1")
    if status:
        lines.append("STATUS=" + status.replace("\n", " "))
    return _send(lines)


def reloading() -> bool:
    """Notify systemd that a reload has begun; end it with ``notify(ready=True)``."""
    return _send(["RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}"])


def extend(seconds: float) -> bool:
    """Ask for ``seconds`` more while starting or stopping."""
    return _send([f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}"])


def watchdog_period() -> float:
    """Return the watchdog timeout in seconds; 0.0 without a watchdog."""
    pid = os.environ.get("WATCHDOG_PID", "")
    if pid and pid != str(os.getpid()):
        return 0.0
    try:
        return int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6
    except ValueError:
        return 0.0


async def keep_telling(status: Callable[[], str]) -> None:
    """Update the status line and the watchdog until cancelled; return at once if not started by systemd.

    This runs on the loop, so a hung loop triggers the watchdog. A lost datagram or a status that can't be
    computed just now must not end it: the watchdog would kill the whole daemon.
    """
    if not os.environ.get("NOTIFY_SOCKET"):
        return
    period = watchdog_period()
    pause = min(STATUS_SECONDS, period / 3) if period else STATUS_SECONDS
    sent = ""
    attempt = LogAndRetry("the status line", logging.getLogger("sollold"))
    while True:
        notify(watchdog=True)
        await asyncio.sleep(pause)
        with attempt:
            line = status()
            if line != sent and notify(status=line):
                sent = line


def _send(lines: list[str]) -> bool:
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address or not lines:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as link:
            link.setblocking(False)
            link.connect(address)
            link.sendall("\n".join(lines).encode())
    except OSError:
        return False
    return True
