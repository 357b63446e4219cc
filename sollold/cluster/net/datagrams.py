"""The UDP socket for gossip: sends and receives sealed datagrams, without a queue."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable

from sollold.cluster.gossip.actions import Address
from sollold.cluster.net.dialer import socket_address
from sollold.cluster.net.open_sockets import literal
from sollold.cluster.net.packet_seal import OpenedPacket, Sealer
from sollold.cluster.net.rpc_server import bound

_MAX_BYTES = 65536
_MAX_BURST = 64
"""Maximum datagrams read before other callbacks run."""


class Datagrams:
    """The UDP socket for gossip.

    Args:
        sealer: encrypts and decrypts datagrams.
        heard: called with every datagram of a member.
    """

    def __init__(self, sealer: Sealer, heard: Callable[[OpenedPacket, Address], None]) -> None:
        self._sealer = sealer
        self._heard = heard
        self._socket: socket.socket | None = None
        self._ipv6 = False

    def start(self, host: str, port: int) -> None:
        """Start to listen.

        Raises:
            PortTaken: another program has the port.
            OSError: ``host`` is not an address of this machine.
        """
        self._socket = bound(socket.SOCK_DGRAM, host, port)
        self._ipv6 = self._socket.family == socket.AF_INET6
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._readable)

    def close(self) -> None:
        """Stop listening."""
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None

    def send(self, address: Address, data: bytes) -> None:
        """Seal and send ``data``. If the system does not accept it, it is lost, as on the network."""
        if self._socket is None:
            return
        with contextlib.suppress(OSError, ValueError, OverflowError):
            host, port = address
            if self._ipv6 and ":" not in host:
                host = f"::ffff:{host}"
            _, target = socket_address((host, port))
            self._socket.sendto(self._sealer.seal(data), target)

    def _readable(self) -> None:
        for _ in range(_MAX_BURST):
            if self._socket is None:
                return
            try:
                packet, source = self._socket.recvfrom(_MAX_BYTES)
            except BlockingIOError:
                return
            except OSError:
                continue  # ICMP error for an earlier datagram
            opened = self._sealer.open(packet)
            if opened is not None:
                self._heard(opened, literal(source))
