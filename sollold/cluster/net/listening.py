"""Listens for other nodes: TCP and UDP on one port, with IPv4 alone if there is no IPv6."""

from __future__ import annotations

import errno
import logging

from sollold.cluster.net.datagrams import Datagrams
from sollold.cluster.net.rpc_server import PortTaken, RpcServer
from sollold.errors import system_reason

log = logging.getLogger("sollold.cluster")

_ANY_ADDRESS = "::"
_NO_IPV6 = frozenset((errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT, errno.ENOPROTOOPT))
_MAX_TRIES = 20
"""Attempts to find a port that is free for both, if the settings name none."""


async def listen(peers: RpcServer, datagrams: Datagrams, host: str, port: int) -> tuple[str, int]:
    """Start both; empty ``host``: all addresses; ``port`` 0: any. Returns the host and port used.

    Raises:
        PortTaken: the port is in use.
        OSError: the address can't be listened on.
    """
    host = host or _ANY_ADDRESS
    if host == _ANY_ADDRESS:
        try:
            return host, await _listen_on(peers, datagrams, host, port)
        except OSError as error:
            if error.errno not in _NO_IPV6:
                raise
            log.info("no IPv6 here (%s): other nodes reach this one over IPv4", system_reason(error))
            host = "0.0.0.0"
    return host, await _listen_on(peers, datagrams, host, port)


async def _listen_on(peers: RpcServer, datagrams: Datagrams, host: str, port: int) -> int:
    tries = _MAX_TRIES
    while True:
        tries -= 1
        found = await peers.start(host, port)
        try:
            datagrams.start(host, found)
            return found
        except PortTaken:
            await peers.close()
            if port or not tries:
                raise
