"""What commands say about servers that are no nodes."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from sollold.cli.exit import Exit
from sollold.cli.main import main

COMMANDS = [
    ["status"], ["ps"], ["models"], ["nodes"], ["version"], ["doctor"], ["key", "list"],
    ["cluster", "members"], ["plan", "m"], ["route", "m"], ["load", "m"], ["drain"], ["scan"], ["invite"],
]  # fmt: skip


@pytest.fixture
def stranger(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a server that sends the parameter after each request."""
    server = socket.create_server(("127.0.0.1", 0), backlog=100)

    def serve() -> None:
        while True:
            try:
                connection = server.accept()[0]
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.settimeout(10)
                connection.recv(1 << 16)
                connection.sendall(request.param)
                connection.shutdown(socket.SHUT_WR)
                # Closing with unread bytes, such as the request's body, would reset the connection.
                while connection.recv(1 << 16):
                    pass

    thread = threading.Thread(target=serve)
    thread.start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}"
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join()


def _response(status: str, body: str = "", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", "Connection: close", f"Content-Length: {len(body)}", *headers, "", body]
    return "\r\n".join(lines).encode()


def _errors(url: str, capsys: pytest.CaptureFixture[str]) -> Iterator[tuple[list[str], int, str]]:
    for command in COMMANDS:
        status = main(["--node", url, *command])
        yield command, status, capsys.readouterr().err


@pytest.mark.parametrize(
    ("stranger", "message"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "is not sollold: it does not speak HTTP\n"),
        (
            _response("302 Found", "", "Location: https://pc/"),
            " redirects to https://pc/: name that node with",
        ),
        (_response("200 OK", "{"), "is not sollold: it sends no JSON object\n"),
        (_response("200 OK", "{")[:-1], "was lost: it ended before the end of the answer\n"),
        (_response("404 Not Found", "<p>"), "is not sollold: it answers with HTTP status 404\n"),
    ],
    indirect=["stranger"],
)
def test_a_server_that_is_no_node_is_named_as_such(
    stranger: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command, status, error in _errors(stranger, capsys):
        assert status == Exit.FAILED and stranger in error and message in error, command


@pytest.mark.parametrize("stranger", [_response("200 OK", "{}"), _response("200 OK")], indirect=True)
def test_a_server_without_the_fields_of_a_node_is_none(
    stranger: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command, status, error in _errors(stranger, capsys):
        assert (status, "its answer lacks what a node sends" in error) == (Exit.FAILED, True), command
