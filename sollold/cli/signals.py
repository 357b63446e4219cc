"""SIGTERM and a terminal that is closed end a command as Ctrl-C does: what it holds is given back first.

Left to themselves they end Python at once: a terminal would stay without its cursor or without what is typed
on it, and a compiler would go on.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import NoReturn

ENDS = (signal.SIGTERM, signal.SIGHUP)


def end_in_order() -> None:
    """From now on the first of `ENDS` raises `SystemExit`; one more ends the process at once.

    One that is ignored (``nohup``) stays so.
    """
    for number in ENDS:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    for one in ENDS:
        if signal.getsignal(one) is _end:
            signal.signal(one, signal.SIG_DFL)
    raise SystemExit(128 + number)
