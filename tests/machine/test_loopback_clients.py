"""The users of the processes that are connected to a loopback port."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from sollold.machine import sock_diag
from sollold.machine.loopback_clients import client_users, listed_users
from tests.strangers import NOBODY, stranger


async def by_netlink(port: int) -> Mapping[int, int] | None:
    return sock_diag.users_of_clients(port)


async def by_table(port: int) -> Mapping[int, int] | None:
    return await asyncio.to_thread(listed_users, port)


@pytest.mark.parametrize("users_of", [client_users, by_netlink, by_table])
async def test_users_of_a_ports_clients_are_found(
    users_of: Callable[[int], Awaitable[Mapping[int, int] | None]],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as mine:
        port = server.getsockname()[1]
        assert await users_of(port) == {}
        mine.connect(("127.0.0.1", port))
        own = mine.getsockname()[1]
        assert await users_of(port) == {own: os.geteuid()}, "also before the connection is accepted"
        assert await users_of(own) in ({port: os.geteuid()}, {port: 0})
        with stranger(port), stranger(port, "::ffff:127.0.0.1"):
            users = dict(await users_of(port) or {})
            assert users.pop(own) == os.geteuid()
            assert list(users.values()) == [NOBODY, NOBODY]
        mine.close()
        assert own not in (await users_of(port) or {})


async def test_many_clients_need_several_netlink_messages() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=600) as server, ExitStack() as stack:
        port = server.getsockname()[1]
        own = set()
        for _ in range(500):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            own.add(client.getsockname()[1])
        assert sock_diag.users_of_clients(port) == dict.fromkeys(own, os.geteuid())


async def test_proc_is_read_if_netlink_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sock_diag, "_BY_FAMILY", 77)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as mine:
        port = server.getsockname()[1]
        mine.connect(("127.0.0.1", port))
        with pytest.raises(OSError, match="sock_diag"):
            sock_diag.users_of_clients(port)
        assert await client_users(port) == {mine.getsockname()[1]: os.geteuid()}


def test_connections_of_other_ports_addresses_and_states_are_ignored(tmp_path: Path) -> None:
    head = (
        b"  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
    )
    row = "   1: 0100007F:%04X %s:%04X %s 00000000:00000000 00:00000000 00000000  1000  0 77 1 0 20 4 30\n"
    rows = [
        row % (1, "0100007F", 18080, "01"),
        row % (2, "0100007F", 18081, "01"),
        row % (3, "0501A8C0", 18080, "01"),
        row % (4, "0100007F", 18080, "06"),
    ]
    (tmp_path / "tcp").write_bytes(head + "".join(rows).encode())
    assert listed_users(18080, tmp_path) == {1: 1000}, "also without a table for IPv6"
    assert listed_users(18080, tmp_path / "nowhere") is None
