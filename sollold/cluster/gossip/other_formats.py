"""Who speaks another format of packets than this node, being of another release: neither hears the other."""

from __future__ import annotations

from sollold.cluster.gossip.actions import Address
from sollold.cluster.gossip.packet import FORMAT, format_of

KEPT_SECONDS = 600.0
"""A node tries again where it hears nobody; one that is silent for longer has gone or was upgraded."""
_MOST = 64


class OtherFormats:
    """IP addresses of nodes whose packets were not understood because of their format."""

    def __init__(self) -> None:
        self._heard: dict[str, tuple[int, float]] = {}

    def note(self, data: bytes, source: Address | None, now: float) -> None:
        """A packet or a push-pull was not understood."""
        number = format_of(data)
        if source is None or number in (0, FORMAT):
            return
        self._heard.pop(source[0], None)
        self._heard[source[0]] = number, now
        if len(self._heard) > _MOST:
            del self._heard[next(iter(self._heard))]

    def understood(self, source: Address | None) -> None:
        """One was: it has been upgraded."""
        if self._heard and source is not None:
            self._heard.pop(source[0], None)

    def heard(self, now: float) -> dict[str, int]:
        """IP address → format, of those heard of late."""
        return {ip: number for ip, (number, then) in self._heard.items() if now - then < KEPT_SECONDS}
