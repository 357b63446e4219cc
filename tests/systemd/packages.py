"""The Debian packages, built by their script."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def build(out: Path, *words: str, **environment: str) -> list[Path]:
    """Build the packages and return them. ``SOLLOLD_TEST_DEBS`` names a folder with packages built before."""
    if before := os.environ.get("SOLLOLD_TEST_DEBS"):
        return sorted((Path(before) / ("newer" if environment else "")).glob("*.deb"))
    done = subprocess.run(
        [sys.executable, str(ROOT / "packaging/deb/build"), "--out", str(out), *words],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return sorted(out.glob("*.deb"))
