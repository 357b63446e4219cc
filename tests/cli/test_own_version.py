"""Builds report their commit if it is known."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from sollold import __version__
from sollold.cli import own_version
from sollold.cli.main import main


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    done = subprocess.run(
        ("git", "-C", folder, *identity, *words), check=True, capture_output=True, text=True, timeout=30
    )
    return done.stdout.strip()


def test_a_checkout_reports_its_commit_and_local_changes(tmp_path: Path) -> None:
    package = tmp_path / "sollold"
    package.mkdir()
    (package / "a.py").write_text("1")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "one")
    git(tmp_path, "tag", "v0")
    commit = git(tmp_path, "rev-parse", "--short=12", "HEAD")
    assert own_version.own_commit(package) == commit
    (package / "a.py").write_text("2")
    assert own_version.own_commit(package) == f"{commit}-dirty"


def test_a_package_reports_the_commit_of_its_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert own_version.own_commit(tmp_path) == ""
    (tmp_path / "commit").write_text("0123456789ab\n")
    assert own_version.own_commit(tmp_path) == "0123456789ab"
    for commit, words in (("0123456789ab", " (commit 0123456789ab)"), ("", "")):
        monkeypatch.setattr(own_version, "own_commit", lambda commit=commit: commit)
        with pytest.raises(SystemExit) as ended:
            main(["--version"])
        assert not ended.value.code
        assert capsys.readouterr().out == f"sollold {__version__}{words}\n"
