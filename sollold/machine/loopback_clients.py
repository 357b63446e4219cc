"""Finds the users whose programs are connected to a loopback port.

Linux reports the owner of the client's socket, even for connections not yet accepted: through netlink, or in
``/proc/net/tcp`` on kernels built without that. See proc(5).
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from sollold.machine import sock_diag

_ESTABLISHED = b"01"
_LOOPBACK = "127.0.0.1"


async def client_users(port: int) -> Mapping[int, int] | None:
    """Return client port → user id for all connections to ``port`` of 127.0.0.1.

    Returns None if this system does not report it.
    """
    try:
        return sock_diag.users_of_clients(port)
    except OSError:
        return await asyncio.to_thread(listed_users, port)


def listed_users(port: int, folder: Path = Path("/proc/net")) -> Mapping[int, int] | None:
    """Read the same from the table. Blocks for as long as the kernel takes to list all connections."""
    try:
        with (folder / "tcp").open("rb") as table:
            found = dict(_clients(table, port))
    except OSError:
        return None
    try:
        with (folder / "tcp6").open("rb") as table:
            found.update(_clients(table, port))
    except OSError:
        return found  # the kernel has no IPv6
    return found


def _clients(table: Iterator[bytes], port: int) -> Iterator[tuple[int, int]]:
    pattern = f":{port:04X} ".encode() + _ESTABLISHED + b" "
    for row in table:
        if pattern not in row:
            continue
        fields = row.split()
        address, _, _ = fields[2].partition(b":")
        if address in _ADDRESSES:
            yield int(fields[1].rpartition(b":")[2], 16), int(fields[7])


def _hex_address(family: socket.AddressFamily, address: str) -> bytes:
    """Return an address as the kernel writes it: words in native byte order."""
    packed = socket.inet_pton(family, address)
    return b"".join(b"%08X" % word for word in struct.unpack(f"={len(packed) // 4}I", packed))


_ADDRESSES = (_hex_address(socket.AF_INET, _LOOPBACK), _hex_address(socket.AF_INET6, f"::ffff:{_LOOPBACK}"))
