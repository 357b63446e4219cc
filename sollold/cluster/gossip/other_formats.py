"""Tracks nodes of other releases whose packet format this node does not understand, nor they ours."""

from __future__ import annotations

from sollold.bounded import BoundedDict
from sollold.cluster.gossip.actions import Address
from sollold.cluster.gossip.packet import FORMAT, format_of

KEPT_SECONDS = 600.0
"""Seconds for which such a node is remembered. It keeps trying; a silent one has gone or was upgraded."""
_MAX_ADDRESSES = 64


class OtherFormats:
    """IP addresses of nodes that sent packets of another format."""

    def __init__(self) -> None:
        self._heard: BoundedDict[str, tuple[int, float]] = BoundedDict(_MAX_ADDRESSES)

    def note(self, data: bytes, source: Address | None, now: float) -> None:
        """Note a packet or push-pull body that could not be decoded."""
        number = format_of(data)
        if source is None or number in (0, FORMAT):
            return
        self._heard[source[0]] = number, now

    def understood(self, source: Address | None) -> None:
        """Note a packet that was decoded: the node has been upgraded."""
        if self._heard and source is not None:
            self._heard.pop(source[0], None)

    def heard(self, now: float) -> dict[str, int]:
        """Return IP address → format of recently heard nodes."""
        return {ip: number for ip, (number, heard) in self._heard.items() if now - heard < KEPT_SECONDS}
