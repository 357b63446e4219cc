"""A node that hangs is told from one that works for long, and commands say so."""

from __future__ import annotations

import contextlib
import io
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sollold.cli.exit import Exit
from sollold.cli.main import main
from sollold.client import blocking, silence
from sollold.client.blocking import BlockingClient
from sollold.client.errors import NodeSilent


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silence, "_SILENT_SECONDS", 0.02)
    monkeypatch.setattr(blocking, "HEALTH_SECONDS", 0.05)
    for module in (silence, blocking):
        monkeypatch.setattr(module, "HUNG_SECONDS", 0.2)


@pytest.fixture
def hung() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0), backlog=100) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


class _Node(BaseHTTPRequestHandler):
    """Answers ``/health`` while `healthy`; other responses wait for `asked` such questions to be answered."""

    protocol_version = "HTTP/1.1"
    healthy = threading.Event()
    asked = threading.Semaphore(0)

    def do_GET(self) -> None:
        if self.path == "/health":
            self.healthy.wait()
            self.asked.release()
        else:
            for _ in range(3):
                self.asked.acquire()
        self._send(b"{}")

    def do_POST(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"9\r\n" + b'{"a": 1}\n' + b"\r\n")
        self.healthy.wait()

    def _send(self, body: bytes) -> None:
        with contextlib.suppress(OSError):  # the question was given up
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def node() -> Iterator[str]:
    _Node.healthy = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Node)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    _Node.healthy.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hung_node_is_reported_before_and_when_the_request_gives_up(hung: str) -> None:
    notes: list[str] = []
    client = BlockingClient(hung, timeout=100.0, notice=notes.append)
    with pytest.raises(NodeSilent, match=r"did not answer within 0\.2 s"):
        client.get("/api/cluster")
    assert notes == [f"{hung} does not respond; waiting up to 0.2 s"]


def test_a_long_request_to_a_node_that_works_goes_on(node: str) -> None:
    _Node.healthy.set()
    notes: list[str] = []
    assert BlockingClient(node, timeout=100.0, notice=notes.append).get("/api/slow") == {}
    assert not notes


def test_a_stream_ends_when_its_node_hangs(node: str) -> None:
    lines = BlockingClient(node).stream("/api/chat", {})
    assert next(lines) == {"a": 1}
    with pytest.raises(NodeSilent):
        next(lines)


def test_commands_count_a_hung_node_as_not_answering(
    hung: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    for command in (["status"], ["chat", "m", "hi"], ["events"], ["pull", "m"], ["copy", "a", "b"]):
        assert main(["--node", hung, *command]) == Exit.UNREACHABLE
        first, last = capsys.readouterr().err.splitlines()
        assert first == f"sollold: {hung} does not respond; waiting up to 0.2 s" and "hangs" in last


def test_a_name_that_cannot_be_looked_up_says_why(
    hung: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOLLOLD_NODE_URL", hung)
    monkeypatch.setattr("sollold.cli.asking._is_host", lambda name: False)
    assert main(["--node", "nobody", "status"]) == Exit.UNREACHABLE
    assert "no machine is named 'nobody', and the nodes' names are unknown" in capsys.readouterr().err
