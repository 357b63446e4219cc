from __future__ import annotations

import os
import socket
from pathlib import Path

from sollold.machine.loopback_clients import client_users
from tests.strangers import NOBODY, stranger


def test_the_users_of_a_ports_clients() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as mine:
        port = server.getsockname()[1]
        assert client_users(port) == {}
        mine.connect(("127.0.0.1", port))
        own = mine.getsockname()[1]
        assert client_users(port) == {own: os.geteuid()}, "nobody has accepted it yet"
        assert client_users(own) == {port: os.geteuid()} or client_users(own) == {port: 0}
        with stranger(port), stranger(port, "::ffff:127.0.0.1"):
            users = dict(client_users(port) or {})
            assert users.pop(own) == os.geteuid()
            assert list(users.values()) == [NOBODY, NOBODY]


def test_what_does_not_lead_to_the_port_does_not_count(tmp_path: Path) -> None:
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
    assert client_users(18080, tmp_path) == {1: 1000}, "without a table for IPv6"
    assert client_users(18080, tmp_path / "nowhere") is None
