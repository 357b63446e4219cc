"""The UDP socket for gossip: sealed datagrams in and out, nothing queued."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

from sollold.cluster.gossip.actions import Address
from sollold.cluster.net.dialer import socket_address
from sollold.cluster.net.open_sockets import literal
from sollold.cluster.net.packet_seal import OpenedPacket, Sealer
from sollold.cluster.net.rpc_server import bound

log = logging.getLogger("sollold.cluster")

_LARGEST = 65536
_AT_ONCE = 64
"""Datagrams read before other work gets its turn."""


class Datagrams:
    """The socket.

    Args:
        sealer: seals and opens.
        heard: called with every datagram of a member.
    """

    def __init__(self, sealer: Sealer, heard: Callable[[OpenedPacket, Address], None]) -> None:
        self._sealer = sealer
        self._heard = heard
        self._socket: socket.socket | None = None
        self._ipv6 = False
        self.unsent = 0
        """Datagrams that the system did not take: no route, or its buffer was full. They count as lost."""

    def start(self, host: str, port: int) -> None:
        """Listen.

        Raises:
            PortTaken: another program has the port.
            OSError: ``host`` is no address of this machine.
        """
        self._socket = bound(socket.SOCK_DGRAM, host, port)
        self._ipv6 = self._socket.family == socket.AF_INET6
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._readable)

    def close(self) -> None:
        """Listen no more."""
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None

    def send(self, address: Address, data: bytes) -> None:
        """Seal and send; a datagram that can't be sent is lost, as it may be on its way."""
        if self._socket is None:
            return
        try:
            host, port = address
            if self._ipv6 and ":" not in host:
                host = f"::ffff:{host}"
            _, place = socket_address((host, port))
            self._socket.sendto(self._sealer.seal(data), place)
        except (OSError, ValueError, OverflowError):
            self.unsent += 1

    def _readable(self) -> None:
        for _ in range(_AT_ONCE):
            if self._socket is None:
                return
            try:
                packet, place = self._socket.recvfrom(_LARGEST)
            except BlockingIOError:
                return
            except OSError:
                continue  # what ICMP said of an earlier datagram
            opened = self._sealer.open(packet)
            if opened is not None:
                self._heard(opened, literal(place))
