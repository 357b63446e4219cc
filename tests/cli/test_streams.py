"""Output to a closed pipe, to a full disk, and in a locale without Unicode."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from sollold.cli.answer import Sampling, answer
from sollold.cli.asking import console
from sollold.cli.exit import Exit
from sollold.cli.main import main
from sollold.client.blocking import BlockingClient


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "sollold", *words]


def environment(**more: str) -> dict[str, str]:
    """The environment of a shell: output to a pipe is block-buffered."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | more


@pytest.mark.parametrize("words", [("--help",), ("token",), ("config", "--config", "/dev/null")])
def test_a_closed_pipe_is_not_an_error(words: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            command(*words), stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, env=environment()
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (Exit.DONE, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_a_one_line_error() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command("token"), stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, env=environment()
        )
    assert done.returncode == Exit.FAILED
    assert "No space left" in done.stderr and len(done.stderr.splitlines()) == 1


def test_unencodable_characters_are_replaced() -> None:
    words = command("config", "--config", "/dev/null", "--set", "node.name=caf\u00e9 \u2588")
    more = environment(PYTHONIOENCODING="ascii", PYTHONUTF8="1")
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=more)
    assert done.returncode == Exit.DONE, done.stderr
    assert '"caf? #"' in done.stdout
    done = subprocess.run([*words, "--json"], capture_output=True, text=True, timeout=60, env=more)
    assert json.loads(done.stdout)["node.name"]["value"] == "caf\u00e9 \u2588"


def test_undecodable_arguments_are_refused() -> None:
    words: list[str | bytes] = [*command("chat", "any"), b"\xff", "--node", "127.0.0.1:9"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == Exit.USAGE
    assert "encoding" in done.stderr and len(done.stderr.splitlines()) == 1


def test_an_undecodable_prompt_is_accepted() -> None:
    words = command("chat", "any", "--node", "127.0.0.1:9")
    done = subprocess.run(words, input=b"caf\xe9", capture_output=True, timeout=60)
    assert done.returncode == Exit.UNREACHABLE
    assert b"no daemon answers" in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.parametrize("terminal", [True, False])
def test_an_answer_cannot_control_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    chunks = [{"message": {"content": "a\x1b]52;c;cm0=\x07\tb\n"}}, {"message": {}, "done": True}]

    class Node(BlockingClient):
        def stream(self, *_: object, **__: object) -> Any:
            return (chunk for chunk in chunks)

    told = answer(Node("http://127.0.0.1:9"), "m", [], Sampling(verbose=False))
    output = capsys.readouterr().out
    assert "\tb\n" in output and ("\x1b" in output) is not terminal
    assert told.text == "a\x1b]52;c;cm0=\x07\tb\n"


def test_a_command_with_closed_output_works() -> None:
    words = f"{sys.executable} -m sollold config --config /dev/null >&- <&-"
    done = subprocess.run(words, shell=True, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (Exit.DONE, "")


@pytest.mark.parametrize("words", [("load", "any"), ("status",)])
def test_a_command_with_closed_standard_error_works(words: tuple[str, ...]) -> None:
    line = f"{' '.join(command(*words))} --node 127.0.0.1:9 2>&-"
    done = subprocess.run(line, shell=True, stdout=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (Exit.UNREACHABLE, "")


def test_piped_lines_are_not_wrapped(capsys: pytest.CaptureFixture[str]) -> None:
    long = Path("/" + "far " * 100)
    words = ["config", "--config", "/dev/null", "--set", f"node.state_dir={long}"]
    assert main(words) == Exit.DONE
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "node.state_dir" in line]
    assert str(long).rstrip() in line


def test_control_characters_in_names_are_removed(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("node")
    table.add_row("x\x1b]0;mine\x07\x9by\r")
    console().print(table, style="red")
    console(stderr=True).print("x\x1b[2Jy")
    output = "".join(capsys.readouterr())
    assert "mine" in output and not {"\x1b", "\x07", "\x9b", "\r"} & set(output)


def whole_request(link: socket.socket) -> bytes:
    """Read one request with its body. Closing a socket with unread data would reset the connection."""
    got = b""
    while b"\r\n\r\n" not in got:
        got += link.recv(1 << 16)
    head, _, body = got.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", head)
    while length and len(body) < int(length[1]):
        body += link.recv(1 << 16)
    return head + body


class Broken(threading.Thread):
    """A node that dies between two chunks of its answer, once."""

    def __init__(self, lines: list[bytes]) -> None:
        super().__init__()
        self._lines = lines
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"

    def run(self) -> None:
        while True:
            with self._listening.accept()[0] as link:
                request = whole_request(link)
                if b"/api/chat" not in request and b"/api/pull" not in request:
                    link.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
                    continue
                link.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                for line in self._lines:
                    link.sendall(b"%x\r\n%s\r\n" % (len(line), line))
            self._listening.close()
            return


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (("chat", "m", "hello"), [b'{"message": {"content": "Hel"}, "done": false}\n']),
        (("chat", "m", "hello"), []),
        (("pull", "m"), [b'{"status": "pulling manifest"}\n']),
        (("pull", "m"), []),
        (("pull", "m", "--json"), [b'{"status": "pulling manifest"}\n']),
    ],
)
def test_a_node_that_dies_during_an_answer_is_reported(words: tuple[str, ...], lines: list[bytes]) -> None:
    node = Broken(lines)
    node.start()
    done = subprocess.run(
        command("--node", node.url, *words),
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )
    node.join(30)
    assert done.returncode == Exit.FAILED
    assert f"the connection to {node.url} was lost: it ended before the end" in done.stderr
