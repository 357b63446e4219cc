"""`sollold doctor` if no daemon answers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from sollold.cli import doctor as doctor_command
from sollold.cli import nodes, service
from sollold.cli.exit import Exit
from sollold.client.blocking import BlockingClient


def doctor(folder: Path, states: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run doctor on a machine where systemctl prints ``states``; empty: a machine without systemd."""
    tools = folder / "tools"
    tools.mkdir()
    if states:
        (tools / "systemctl").write_text(f"#!/bin/sh\nprintf '{states}'\n")
        (tools / "systemctl").chmod(0o755)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("SOLLOLD_")},
        "PATH": str(tools),
        "SOLLOLD_CONFIG": os.devnull,
        "SOLLOLD_HTTP_HOST": "127.0.0.1",
        **more,
    }
    words = [sys.executable, "-m", "sollold", "doctor", "--json"]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, env=environment)


def findings(folder: Path, states: str) -> list[dict[str, Any]]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening
        done = doctor(folder, states, SOLLOLD_HTTP_PORT=str(taken.getsockname()[1]))
    assert done.returncode == Exit.FAILED, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    assert "no daemon answers" in found[0]["what"]
    return found[1:]


@pytest.mark.parametrize(
    ("states", "finding", "fix"),
    [
        ("LoadState=loaded\\nActiveState=inactive\\n", "not started", "sudo systemctl enable --now sollold"),
        ("LoadState=loaded\\nActiveState=failed\\n", "has failed", "sudo journalctl -u sollold -n 30"),
        ("LoadState=loaded\\nActiveState=activating\\n", "keeps failing", "sudo journalctl -u sollold -n 30"),
        ("LoadState=loaded\\nActiveState=active\\n", "does not answer", "sudo journalctl -u sollold -n 30"),
        ("LoadState=not-found\\nActiveState=inactive\\n", "not installed", "sollold run"),
        ("LoadState=masked\\nActiveState=inactive\\n", "masked", "systemctl status sollold"),
        ("", "not installed", "sollold run"),
    ],
)
def test_the_state_of_the_service_is_reported(tmp_path: Path, states: str, finding: str, fix: str) -> None:
    (found,) = findings(tmp_path, states)
    assert finding in found["what"] and found["fix"] == fix


def test_settings_that_prevent_a_start_are_reported(tmp_path: Path) -> None:
    (tmp_path / "sollold").mkdir()
    (tmp_path / "sollold/sollold.toml").write_text("[http]\n[http]\n")
    states = "LoadState=loaded\\nActiveState=failed\\n"
    done = doctor(tmp_path, states, SOLLOLD_CONFIG="", XDG_CONFIG_HOME=str(tmp_path), SOLLOLD_HTTP_PORT="9")
    silent, _, settings = json.loads(done.stdout)
    assert "no daemon answers at http://127.0.0.1:9" in silent["what"]
    assert "sollold.toml: not TOML" in settings["what"] and "systemctl restart sollold" in settings["fix"]


def test_an_existing_user_service_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert service.journalctl() == ["journalctl", "-u", "sollold"]
    monkeypatch.setattr(doctor_command, "_service", lambda: ("not-found", "inactive"))
    fix = "sollold install --user --now; or, in this terminal: sollold run"
    assert doctor_command._why_silent()[0]["fix"] == fix
    service.unit_file().parent.mkdir(parents=True)
    service.unit_file().touch()
    assert service.journalctl() == ["journalctl", "--user", "-u", "sollold"]
    monkeypatch.setattr(doctor_command, "_service", lambda: ("loaded", "inactive"))
    assert doctor_command._why_silent()[0]["fix"] == "systemctl --user enable --now sollold"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert doctor_command._why_silent()[0]["fix"] == "sudo systemctl enable --now sollold"


@pytest.mark.parametrize("option", [[], ["--follow"]])
@pytest.mark.parametrize(
    ("script", "status", "out"),
    [
        ("echo 'Nov 30 line'", Exit.DONE, "Nov 30 line\n"),
        ("echo '-- No entries --'", Exit.FAILED, ""),
        ("exit 1", Exit.FAILED, ""),
    ],
)
def test_a_journal_without_entries_is_reported(
    tmp_path: Path, script: str, status: int, out: str, option: list[str]
) -> None:
    program = tmp_path / "journalctl"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    words = [sys.executable, "-m", "sollold", "logs", *option]
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stdout) == (status, out)
    assert ("started by hand" in done.stderr) == (status != Exit.DONE)


def test_the_local_service_does_not_explain_a_silent_remote_node(tmp_path: Path) -> None:
    states = "LoadState=loaded\\nActiveState=inactive\\n"
    done = doctor(tmp_path, states, SOLLOLD_NODE_URL="http://127.0.0.1:9")
    assert done.returncode == Exit.UNREACHABLE and not done.stdout
    assert "no daemon answers at http://127.0.0.1:9" in done.stderr


@pytest.mark.parametrize(
    ("service", "fix"),
    [
        (("loaded", "active"), "sudo systemctl restart sollold"),
        (("loaded", "inactive"), "end its process, and start it again"),
        (("", ""), "end its process, and start it again"),
    ],
)
def test_a_hung_daemon_is_reported(
    service: tuple[str, str], fix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A daemon that accepts connections but does not answer is neither missing nor another program."""
    monkeypatch.setattr(doctor_command, "_service", lambda: service)
    options = Namespace(node="", json=True)
    with socket.create_server(("127.0.0.1", 0)) as hung:
        silent = BlockingClient(f"http://127.0.0.1:{hung.getsockname()[1]}", timeout=0.2)
        monkeypatch.setattr(doctor_command, "client", lambda options: silent)
        monkeypatch.setattr(nodes, "client", lambda options, timeout: silent)
        assert doctor_command.doctor(options) == Exit.FAILED
        (found,) = json.loads(capsys.readouterr().out)
        assert "did not answer" in found["what"] and found["fix"] == fix
        assert nodes.version(options) == Exit.DONE
        assert json.loads(capsys.readouterr().out)["nodes"] == []
