"""The user's own service: what is written, what is left alone, and that systemd takes it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import IO

import pytest

from sollold.cli import install as room
from sollold.cli.exit import Exit
from sollold.cli.main import main


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user who is not root, with ``sollold`` in the PATH; the unit's path."""
    program = tmp_path / "my bin" / "sollold"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(room.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(room, "_systemctl", lambda *words: 0)
    return tmp_path / "config/systemd/user/sollold.service"


def test_the_unit_names_the_program_and_systemd_takes_it(
    user: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["install", "--user"]) == Exit.DONE
    assert "systemctl --user enable --now sollold" in capsys.readouterr().out
    assert f'ExecStart="{shutil.which("sollold")}" run' in user.read_text()
    if shutil.which("systemd-analyze"):
        words = ["systemd-analyze", "verify", "--user", "--man=no", str(user)]
        environment = {**os.environ, "XDG_RUNTIME_DIR": str(user.parent), "HOME": str(user.parent)}
        done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=60)
        assert "sollold.service:" not in done.stderr, done.stderr


def test_it_is_removed_and_what_is_the_users_own_is_left(user: Path) -> None:
    assert main(["install", "--user", "--now"]) == Exit.DONE and user.exists()
    assert main(["install", "--user", "--remove"]) == Exit.DONE and not user.exists()
    user.write_text("[Service]\nExecStart=/bin/true\n")
    assert main(["install", "--user"]) == Exit.FAILED
    assert main(["install", "--user", "--remove"]) == Exit.FAILED
    assert user.read_text().startswith("[Service]")


def test_root_is_shown_the_package(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room.os, "geteuid", lambda: 0)
    assert main(["install", "--user"]) == Exit.USAGE
    assert "apt install" in capsys.readouterr().err


def test_specifiers_of_systemd_in_a_path_are_no_specifiers() -> None:
    assert 'ExecStart="/home/a b/100%%/sollold" run' in room.unit("/home/a b/100%/sollold")


def test_a_full_disk_leaves_the_unit_that_was_there(
    user: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept" / "sollold.service"
    kept.parent.mkdir()
    user.parent.mkdir(parents=True)
    user.symlink_to(kept)
    assert main(["install", "--user"]) == Exit.DONE
    before = kept.read_text()
    assert user.is_symlink()
    monkeypatch.setattr(room, "unit", lambda found: f"{before}\n")

    def full(descriptor: int, mode: str) -> IO[bytes]:
        os.close(descriptor)
        return Path("/dev/full").open("wb", buffering=0)

    monkeypatch.setattr("sollold.settings.state_file.os.fdopen", full)
    assert main(["install", "--user"]) == Exit.FAILED
    assert f"No space left on device: {kept}" in capsys.readouterr().err
    assert kept.read_text() == before and [*kept.parent.iterdir()] == [kept]
