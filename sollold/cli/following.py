"""Keeps commands that follow a node running while the node is away, as during an upgrade."""

from __future__ import annotations

import os
import select
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from sollold.cli.streams import harmless
from sollold.client.errors import ClientError, NodeSilent

PAUSE = 2.0
"""Seconds between two attempts to reach a node that is away."""
_T = TypeVar("_T")


def end_without_reader() -> None:
    """Exit cleanly when the command's output has no reader any more (``… | head -1``).

    Otherwise it would notice only on its next line, which may come hours later.
    """
    try:
        output = sys.stdout.fileno()
        kind = os.fstat(output).st_mode
        if not (stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind)):
            return
        # Not SIGINT, which shells make background jobs ignore.
        signal.signal(signal.SIGURG, lambda number, frame: sys.exit())
    except (OSError, ValueError):
        return
    watched = (output, threading.get_ident())
    threading.Thread(target=_wait_for_no_reader, args=watched, daemon=True).start()


def _wait_for_no_reader(output: int, caller: int) -> None:
    poll = select.poll()
    poll.register(output, 0)
    poll.poll()
    signal.pthread_kill(caller, signal.SIGURG)


class Follower:
    """Polls a node, and waits while it is away."""

    def __init__(self) -> None:
        self._reached = False
        self._away = False

    def ask(self, ask: Callable[[], _T]) -> _T:
        """The result of ``ask``, as soon as the node responds.

        Raises:
            ClientError: the node refuses, or has never responded.
        """
        while True:
            try:
                found = ask()
            except ClientError as error:
                self.lost(error)
            else:
                self.reached()
                return found

    def reached(self) -> None:
        """Note that the node has responded."""
        if self._away:
            print("sollold: the node responds again", file=sys.stderr)
        self._reached, self._away = True, False

    def lost(self, error: ClientError | None = None) -> None:
        """Note that the node does not respond: print that once, and wait `PAUSE` seconds.

        Raises:
            ClientError: ``error``, if waiting can't help.
        """
        if error is not None:
            refused = error.status and not isinstance(error, NodeSilent)
            if refused or not self._reached:
                raise error
        if not self._away:
            why = error.message.partition(". ")[0] if error is not None else "the node closed the connection"
            print(f"sollold: {harmless(why)}; trying again until Ctrl-C", file=sys.stderr)
        self._away = True
        time.sleep(PAUSE)
