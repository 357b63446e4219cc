"""The report of missing prerequisites by `make`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "packaging" / "prerequisites"


def look(folder: Path, *tools: str) -> subprocess.CompletedProcess[str]:
    """Run the script on a machine that has only ``tools`` and this Python."""
    for tool in ("sh", "head", "ls"):
        (folder / tool).symlink_to(str(shutil.which(tool)))
    for tool in tools:
        (folder / tool).write_text("#!/bin/sh\n")
        (folder / tool).chmod(0o755)
    environment = {"PATH": str(folder), "HOME": str(folder)}
    words = [str(folder / "sh"), str(SCRIPT), sys.executable]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=30)


def test_all_missing_tools_are_named_with_their_packages(tmp_path: Path) -> None:
    done = look(tmp_path)
    assert done.returncode == 1
    for prerequisite in ("make", "a C++ compiler", "git"):
        assert f"  - {prerequisite}\n" in done.stderr
    assert "sudo apt install make g++ git curl" in done.stderr


def test_a_missing_curl_is_not_an_error(tmp_path: Path) -> None:
    done = look(tmp_path, "make", "g++", "git")
    assert done.returncode == 0
    assert "no curl (package curl)" in done.stderr


def test_nothing_is_printed_if_nothing_is_missing(tmp_path: Path) -> None:
    done = look(tmp_path, "make", "clang++", "git", "curl")
    assert (done.returncode, done.stderr) == (0, "")
