"""The time after a request lost its node: how long another one is looked for, and what is borne meanwhile."""

from __future__ import annotations

from sollold.client.errors import ClientError
from sollold.client.node_list import KnownNode
from sollold.client.received import Received

OUTAGE_SECONDS = 120.0
"""For so long a request that lost its node looks for another one."""
INEXACT = "can't be continued exactly"
"""What a node says that can't give the rest of an answer."""
_PAUSE_SECONDS = (0.1, 2.0)
"""Between two rounds over all nodes, at first and at most."""
_MOST_FAILURES = 5
"""So often an engine may fail after a loss of a node, before it is believed to be the request's own fault."""


class Outage:
    """Of one request. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._failures = 0
        self._pause = _PAUSE_SECONDS[0]

    def node_lost(self, known: KnownNode, said: Received, now: float) -> None:
        """The node asked is gone. One that had begun to answer begins the time anew."""
        if said.began:
            said.node_lost(known.name or known.url, now)
            self._since, self._pause = now, _PAUSE_SECONDS[0]
        elif self._since is None:
            self._since = now

    def excuses(self, error: ClientError) -> bool:
        """Whether to try again: the other nodes may not have noticed yet what else went with the lost one."""
        if self._since is None or error.status not in (502, 503) or INEXACT in error.message:
            return False
        if self._failures >= _MOST_FAILURES:
            return False
        self._failures += error.status == 502
        return True

    def too_long(self, now: float) -> bool:
        """Whether to give up."""
        return self._since is not None and now - self._since > OUTAGE_SECONDS

    def next_pause(self) -> float:
        """Seconds until the nodes are asked again; longer each time."""
        pause, self._pause = self._pause, min(_PAUSE_SECONDS[1], self._pause * 2)
        return pause
