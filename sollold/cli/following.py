"""What is watched until Ctrl-C goes on when its node has been away, as at an upgrade."""

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
from sollold.client.errors import ClientError

PAUSE = 2.0
"""Seconds between two tries to reach a node that is away."""
_T = TypeVar("_T")


def end_without_reader() -> None:
    """From now on the command ends as by Ctrl-C when nobody reads its output any more (``… | head -1``).

    Without this it would be told by its next line, for which it may wait for hours.
    """
    try:
        output = sys.stdout.fileno()
        kind = os.fstat(output).st_mode
        if not (stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind)):
            return
        # Not Ctrl-C's own signal, which a shell lets its background jobs ignore.
        signal.signal(signal.SIGURG, signal.default_int_handler)
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
    """Asks a node again and again, and waits for it while it is away."""

    def __init__(self) -> None:
        self._reached = False
        self._away = False

    def ask(self, ask: Callable[[], _T]) -> _T:
        """What ``ask`` gives, as soon as the node answers.

        Raises:
            ClientError: the node refuses, or has never answered.
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
        """The node has answered."""
        if self._away:
            print("sollold: the node answers again", file=sys.stderr)
        self._reached, self._away = True, False

    def lost(self, error: ClientError | None = None) -> None:
        """The node does not answer any more: say so once, and wait for a moment.

        Raises:
            ClientError: ``error``, where waiting changes nothing.
        """
        if error is not None and (error.status or not self._reached):
            raise error
        if not self._away:
            why = (
                error.message.partition(". ")[0] if error is not None else "the node has ended the connection"
            )
            print(f"sollold: {harmless(why)}; trying again until Ctrl-C", file=sys.stderr)
        self._away = True
        time.sleep(PAUSE)
