"""Failover of a request that lost its node: how long to look for another one, which errors to tolerate."""

from __future__ import annotations

from sollold.client.errors import ClientError
from sollold.client.node_list import KnownNode
from sollold.client.received import Received

OUTAGE_SECONDS = 120.0
"""Seconds for which a request that lost its node looks for another one."""
INEXACT = "can't be continued exactly"
"""Error of a node that can't resume an answer."""
_PAUSE_SECONDS = (0.1, 2.0)
"""Initial and maximum pause between two rounds over all nodes, in seconds."""
_MAX_FAILURES = 5
"""Engine failures after the loss of a node that are tolerated before the request itself is blamed."""


class Outage:
    """The outage of one request. Times are monotonic, in seconds."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._failures = 0
        self._pause = _PAUSE_SECONDS[0]

    def node_lost(self, known: KnownNode, received: Received, now: float) -> None:
        """Note that the node is gone. If it had begun to answer, the time limit starts again."""
        if received.began:
            received.node_lost(known.name or known.url, now)
            self._since, self._pause = now, _PAUSE_SECONDS[0]
        elif self._since is None:
            self._since = now

    def excuses(self, error: ClientError) -> bool:
        """Whether to retry: other nodes may not have noticed yet what was lost with the node."""
        if self._since is None or error.status not in (502, 503) or INEXACT in error.message:
            return False
        if self._failures >= _MAX_FAILURES:
            return False
        self._failures += error.status == 502
        return True

    def too_long(self, now: float) -> bool:
        """Whether the time limit has passed."""
        return self._since is not None and now - self._since > OUTAGE_SECONDS

    def next_pause(self) -> float:
        """Seconds until the nodes are asked again; grows each time."""
        pause, self._pause = self._pause, min(_PAUSE_SECONDS[1], self._pause * 2)
        return pause
