"""`sollold run` as a process: start failures, signals and the end."""

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
    """The command of a daemon on loopback that finds no other daemons and no llama.cpp."""
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
    """Return the single error line of a daemon that can't start."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("sollold: ")
    return last


@pytest.mark.parametrize("port_setting", ["http.port", "cluster.port"])
def test_a_port_in_use_is_reported_in_one_line(tmp_path: Path, port_setting: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = fails(command(tmp_path, **{port_setting: port}))
    assert f"port {port}" in line and "on 127.0.0.1" in line and port_setting in line and "in use" in line


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("http.host", "192.0.2.254", "http.host"),
        ("http.host", "a..b", "http.host"),
        ("cluster.host", "192.0.2.254", "cluster.host"),
        ("cluster.host", "2001:db8::1", "cluster.host"),
        ("cluster.seeds", "one:two", "cluster.seeds"),
    ],
)
def test_an_unusable_setting_is_reported_in_one_line(
    tmp_path: Path, setting: str, value: str, message: str
) -> None:
    line = fails(command(tmp_path, **{setting: value}))
    assert message in line and value in line


@contextlib.contextmanager
def running(
    folder: Path, settings: dict[str, object] | None = None, config: str = os.devnull, **more: Any
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Start a daemon, yield its process and HTTP port, and end it with the block."""
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
        assert process.poll() is None, log_text(folder)
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


def log_text(folder: Path) -> str:
    return (folder / "log").read_text(errors="replace")


def test_a_daemon_ends_with_its_terminal(tmp_path: Path) -> None:
    controller, tty = os.openpty()

    def take_terminal() -> None:
        # Under nohup, SIGHUP is inherited as ignored.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        fcntl.ioctl(tty, termios.TIOCSCTTY, 0)

    try:
        with running(tmp_path, stdin=tty, preexec_fn=take_terminal) as (process, _):
            os.close(controller)
            assert process.wait(30) == 0
            assert "Traceback" not in log_text(tmp_path)
    finally:
        os.close(tty)


def ask(port: int, method: str, path: str, body: object = None, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, json.dumps(body) if body is not None else None, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_sighup_reloads_settings_of_a_daemon_without_a_terminal(tmp_path: Path) -> None:
    settings = tmp_path / "sollold.toml"
    settings.write_text('[log]\nlevel = "info"\n')
    write_gguf(tmp_path / "new" / "Tiny-F16.gguf")
    with running(tmp_path, config=str(settings)) as (process, port):
        assert ask(port, "POST", "/api/show", {"model": "mine"})[0] == 404
        assert ask(port, "GET", "/api/version", Origin="http://ui.example")[0] == 403

        settings.write_text("[log]\nlevel = loud\n")
        process.send_signal(signal.SIGHUP)
        until(lambda: "settings not reloaded" in log_text(tmp_path), "the error is logged")

        settings.write_text(
            f'[models]\nfolders = ["{tmp_path}/new"]\ntransfer_rate = "1 MiB"\n'
            '[models.aliases]\nmine = "Tiny:F16"\n[http]\ncors_origins = ["http://ui.example"]\n'
            '[serving]\ndrain_limit = "5s"\nqueue = 7\n[placement]\ncontext = 512\n[node]\nname = "x"\n'
        )
        process.send_signal(signal.SIGHUP)
        until(lambda: "settings reloaded" in log_text(tmp_path), "the settings are reloaded")
        assert ask(port, "GET", "/api/version", Origin="http://ui.example")[0] == 200
        status, shown = ask(port, "POST", "/api/show", {"model": "mine"})
        assert status == 200 and "llama" in shown
        (restart_line,) = [line for line in log_text(tmp_path).splitlines() if "need a restart" in line]
        assert restart_line.endswith(": node.name, serving.queue")
        assert "changed: http.cors_origins, models.folders, models.aliases" in log_text(tmp_path)
        assert process.poll() is None


def test_systemd_is_notified_while_the_daemon_drains(tmp_path: Path) -> None:
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
    *draining, last = [message for message in after if b"STATUS=" in message]
    assert all(b"draining" in message for message in draining)
    assert last == b"STATUS=stopped", "systemd shows it until the next start"
