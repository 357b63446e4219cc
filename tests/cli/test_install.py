"""The user service: the unit file, its acceptance by systemd, and files that must not be changed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import IO

import pytest

from sollold.cli import install as install_command
from sollold.cli.exit import Exit
from sollold.cli.main import main


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set up a non-root user with ``sollold`` in the PATH and return the path of the unit."""
    program = tmp_path / "my bin" / "sollold"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(install_command, "_systemctl", lambda *words: 0)
    return tmp_path / "config/systemd/user/sollold.service"


def test_the_unit_names_the_program_and_is_valid(user: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["install", "--user"]) == Exit.DONE
    assert "systemctl --user enable --now sollold" in capsys.readouterr().out
    assert f'ExecStart="{shutil.which("sollold")}" run' in user.read_text()
    if shutil.which("systemd-analyze"):
        words = ["systemd-analyze", "verify", "--user", "--man=no", str(user)]
        environment = {**os.environ, "XDG_RUNTIME_DIR": str(user.parent), "HOME": str(user.parent)}
        done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=60)
        assert "sollold.service:" not in done.stderr, done.stderr


def test_only_a_unit_of_sollold_is_replaced_or_removed(user: Path) -> None:
    assert main(["install", "--user", "--now"]) == Exit.DONE and user.exists()
    assert main(["install", "--user", "--remove"]) == Exit.DONE and not user.exists()
    user.write_text("[Service]\nExecStart=/bin/true\n")
    assert main(["install", "--user"]) == Exit.FAILED
    assert main(["install", "--user", "--remove"]) == Exit.FAILED
    assert user.read_text().startswith("[Service]")


def test_root_is_referred_to_the_package(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert main(["install", "--user"]) == Exit.USAGE
    assert "apt install" in capsys.readouterr().err


def test_systemd_specifiers_in_a_path_are_escaped() -> None:
    assert 'ExecStart="/home/a b/100%%/sollold" run' in install_command.unit("/home/a b/100%/sollold")


def test_a_full_disk_keeps_the_old_unit(
    user: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept" / "sollold.service"
    kept.parent.mkdir()
    user.parent.mkdir(parents=True)
    user.symlink_to(kept)
    assert main(["install", "--user"]) == Exit.DONE
    before = kept.read_text()
    assert user.is_symlink()
    monkeypatch.setattr(install_command, "unit", lambda found: f"{before}\n")

    def full(descriptor: int, mode: str) -> IO[bytes]:
        os.close(descriptor)
        return Path("/dev/full").open("wb", buffering=0)

    monkeypatch.setattr("sollold.settings.state_file.os.fdopen", full)
    assert main(["install", "--user"]) == Exit.FAILED
    assert f"No space left on device: {kept}" in capsys.readouterr().err
    assert kept.read_text() == before and [*kept.parent.iterdir()] == [kept]
