"""Makes SIGTERM and SIGHUP end a command as Ctrl-C does, after it has cleaned up.

By default they end Python at once, which would leave the terminal without its cursor or echo, and a compiler
running.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import NoReturn

ENDS = (signal.SIGTERM, signal.SIGHUP)


def end_in_order() -> None:
    """Let the first signal of `ENDS` raise `SystemExit`, and a second one end the process at once.

    Signals that are ignored (``nohup``) stay ignored.
    """
    for number in ENDS:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    for signum in ENDS:
        if signal.getsignal(signum) is _end:
            signal.signal(signum, signal.SIG_DFL)
    raise SystemExit(128 + number)
