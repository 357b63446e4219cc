"""`sollold run` as a process: what it says when it can't start, and how it ends."""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.daemons import until
from tests.models.stores import write_gguf


def command(folder: Path, **settings: object) -> list[str]:
    """A daemon on loopback that finds no other and no llama.cpp."""
    values: dict[str, object] = {
        "node.state_dir": folder / "state",
        "node.cache_dir": folder / "cache",
        "http.host": "127.0.0.1",
        "http.port": 0,
        "cluster.host": "127.0.0.1",
        "cluster.port": 0,
        "cluster.mdns": "off",
        "models.huggingface": "off",
        "ollama.enabled": "off",
        "llama.build": "off",
    } | settings
    words = [sys.executable, "-m", "sollold", "run", "--config", os.devnull]
    return words + [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def fails(words: list[str]) -> str:
    """The one line of a daemon that can't start."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("sollold: ")
    return last


@pytest.mark.parametrize("what", ["http.port", "cluster.port"])
def test_a_taken_port_is_named_in_one_line(tmp_path: Path, what: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = fails(command(tmp_path, **{what: port}))
    assert f"port {port}" in line and "on 127.0.0.1" in line and what in line and "in use" in line


@pytest.mark.parametrize(
    ("setting", "value", "what"),
    [
        ("http.host", "192.0.2.254", "http.host"),
        ("http.host", "a..b", "http.host"),
        ("cluster.host", "192.0.2.254", "cluster.host"),
        ("cluster.host", "2001:db8::1", "cluster.host"),
        ("cluster.seeds", "one:two", "cluster.seeds"),
    ],
)
def test_a_setting_that_can_not_be_carried_out_is_named_in_one_line(
    tmp_path: Path, setting: str, value: str, what: str
) -> None:
    line = fails(command(tmp_path, **{setting: value}))
    assert what in line and value in line


@contextlib.contextmanager
def running(
    folder: Path, settings: dict[str, object] | None = None, config: str = os.devnull, **more: Any
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A daemon that has started, and its HTTP port. It is ended with the block."""
    with socket.socket() as link:
        link.bind(("127.0.0.1", 0))
        port = link.getsockname()[1]
    words = command(folder, **{**(settings or {}), "http.port": port})
    words[words.index(os.devnull)] = config
    with (folder / "log").open("wb") as output:
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "start_new_session": True, **more}
        process = subprocess.Popen(words, stdout=output, stderr=output, **options)
    try:
        until(lambda: answers(port) or process.poll() is not None, "the daemon answers")
        assert process.poll() is None, said(folder)
        yield process, port
    finally:
        process.kill()
        process.wait(10)


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def said(folder: Path) -> str:
    return (folder / "log").read_text(errors="replace")


def test_a_daemon_ends_with_its_terminal(tmp_path: Path) -> None:
    ours, theirs = os.openpty()

    def take() -> None:
        # Whoever runs the tests under nohup does not want the daemon to be.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    try:
        with running(tmp_path, stdin=theirs, preexec_fn=take) as (process, _):
            os.close(ours)
            assert process.wait(30) == 0
            assert "Traceback" not in said(tmp_path)
    finally:
        os.close(theirs)


def ask(port: int, method: str, path: str, body: object = None, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, json.dumps(body) if body is not None else None, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_a_daemon_without_a_terminal_reads_its_settings_again(tmp_path: Path) -> None:
    settings = tmp_path / "sollold.toml"
    settings.write_text('[log]\nlevel = "info"\n')
    write_gguf(tmp_path / "new" / "Tiny-F16.gguf")
    with running(tmp_path, config=str(settings)) as (process, port):
        assert ask(port, "POST", "/api/show", {"model": "mine"})[0] == 404
        assert ask(port, "GET", "/api/version", Origin="http://ui.example")[0] == 403

        settings.write_text("[log]\nlevel = loud\n")
        process.send_signal(signal.SIGHUP)
        until(lambda: "settings not reloaded" in said(tmp_path), "the fault is told")

        settings.write_text(
            f'[models]\nfolders = ["{tmp_path}/new"]\ntransfer_rate = "1 MiB"\n'
            '[models.aliases]\nmine = "Tiny:F16"\n[http]\ncors_origins = ["http://ui.example"]\n'
            '[serving]\ndrain_limit = "5s"\nqueue = 7\n[placement]\ncontext = 512\n[node]\nname = "x"\n'
        )
        process.send_signal(signal.SIGHUP)
        until(lambda: "settings reloaded" in said(tmp_path), "the settings are read again")
        assert ask(port, "GET", "/api/version", Origin="http://ui.example")[0] == 200
        status, shown = ask(port, "POST", "/api/show", {"model": "mine"})
        assert status == 200 and "llama" in shown
        (held,) = [line for line in said(tmp_path).splitlines() if "need a restart" in line]
        assert held.endswith(": node.name, serving.queue")
        assert "changed: http.cors_origins, models.folders, models.aliases" in said(tmp_path)
        assert process.poll() is None


def test_systemd_is_told_of_the_draining_until_the_end(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
        link.bind(str(tmp_path / "notify"))
        link.settimeout(30)
        environment = {
            **os.environ,
            "NOTIFY_SOCKET": str(tmp_path / "notify"),
            "WATCHDOG_USEC": "600000",
        }
        with running(tmp_path, env=environment) as (process, _):
            heard = [link.recv(4096)]
            while b"READY=1" not in heard[-1]:
                heard.append(link.recv(4096))
            process.terminate()
            while b"STOPPING=1" not in heard[-1]:
                heard.append(link.recv(4096))
            after = [heard[-1]]
            link.settimeout(0.1)
            while process.poll() is None:
                with contextlib.suppress(TimeoutError):
                    after.append(link.recv(4096))
            assert process.returncode == 0
    assert b"WATCHDOG=1" in after
    assert all(b"draining" in message for message in after if b"STATUS=" in message)
