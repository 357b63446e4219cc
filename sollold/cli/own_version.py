"""The version of this program and, if known, the commit it was built from."""

from __future__ import annotations

import subprocess
from pathlib import Path

from sollold import __version__

_PACKAGE = Path(__file__).parents[1]
"""Folder in which a build stores its commit, in a file ``commit``."""
_TIMEOUT_SECONDS = 5.0


def own_version() -> str:
    """``0.1.0``, or ``0.1.0 (commit 0123456789ab)``."""
    commit = own_commit()
    return f"{__version__} (commit {commit})" if commit else __version__


def own_commit(package: Path = _PACKAGE) -> str:
    """The commit of the running checkout (``-dirty`` if modified) or of the build; empty if unknown."""
    if (package.parent / ".git").exists():
        return _checked_out(package.parent)
    try:
        return (package / "commit").read_text(encoding="ascii").strip()
    except (OSError, UnicodeError):
        return ""


def _checked_out(folder: Path) -> str:
    words = (
        "git",
        "--no-optional-locks",
        "-C",
        folder,
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
        "--exclude=*",
    )
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
