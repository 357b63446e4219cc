"""Whose programs are connected to a port on loopback.

Linux tells the user of the client's own socket, also of a connection that the listening program has not
accepted yet: by netlink, or, where its kernel was built without that, in ``/proc/net/tcp``. See proc(5).
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
    """Client's port → its user's id, for all that are connected to ``port`` of 127.0.0.1.

    None: this system does not tell.
    """
    try:
        return sock_diag.users_of_clients(port)
    except OSError:
        return await asyncio.to_thread(listed_users, port)


def listed_users(port: int, folder: Path = Path("/proc/net")) -> Mapping[int, int] | None:
    """The same from the table. Blocks for as long as the kernel takes to list all connections."""
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
    ending = f":{port:04X} ".encode() + _ESTABLISHED + b" "
    for row in table:
        if ending not in row:
            continue
        fields = row.split()
        address, _, _ = fields[2].partition(b":")
        if address in _ADDRESSES:
            yield int(fields[1].rpartition(b":")[2], 16), int(fields[7])


def _written(family: socket.AddressFamily, address: str) -> bytes:
    """An address as the kernel writes it: words in the machine's own order of bytes."""
    packed = socket.inet_pton(family, address)
    return b"".join(b"%08X" % word for word in struct.unpack(f"={len(packed) // 4}I", packed))


_ADDRESSES = (_written(socket.AF_INET, _LOOPBACK), _written(socket.AF_INET6, f"::ffff:{_LOOPBACK}"))
