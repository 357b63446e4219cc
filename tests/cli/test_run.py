"""`sollold run` as a process: what it says when it can't start, and how it ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


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
        ("cluster.token", "short", "cluster token"),
    ],
)
def test_a_setting_that_can_not_be_carried_out_is_named_in_one_line(
    tmp_path: Path, setting: str, value: str, what: str
) -> None:
    line = fails(command(tmp_path, **{setting: value}))
    assert what in line and (value in line or value == "short")  # secrets are not printed
