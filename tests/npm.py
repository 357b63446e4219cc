"""npm packages for tests, at the versions of a lock file."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def fetched(locked: Path, folder: Path, what: str) -> Path:
    """Install packages with npm. Skips the test if that is not possible.

    Args:
        locked: folder with ``package.json`` and ``package-lock.json``.
        folder: where the packages are installed; also the return value.
        what: the subject of the test, for the skip message.
    """
    missing = [program for program in ("node", "npm") if shutil.which(program) is None]
    if missing:
        pytest.skip(f"{what} NOT tested: no {' and no '.join(missing)} here")
    for name in ("package.json", "package-lock.json"):
        shutil.copy(locked / name, folder)
    command = ("npm", "ci", "--loglevel=error", "--no-audit", "--no-fund", "--ignore-scripts")
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
        fault = f"{done.stdout}{done.stderr}".strip()[-300:] or "no reason given" if done.returncode else ""
    except subprocess.TimeoutExpired:
        fault = "it took longer than two minutes"
    if fault:
        pytest.skip(f"{what} NOT tested: npm could not fetch the packages: {fault}")
    return folder
