"""What ``apt purge`` removes: the script of the Debian package, run on another folder."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "packaging/deb/debian/sollold.postrm"


def purge(root: Path) -> str:
    """Run the script with its folders below ``root``; return what it prints."""
    text = SCRIPT.read_text()
    for folder in ("/var/", "/etc/"):
        text = text.replace(folder, f"{root}{folder}")
    done = subprocess.run(["sh", "-c", text, "postrm", "purge"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stderr


def put(root: Path, *names: str) -> Path:
    state = root / "var/lib/sollold"
    for name in names:
        (state / name).parent.mkdir(parents=True, exist_ok=True)
        (state / name).touch()
    return state


def test_purge_removes_the_state(tmp_path: Path) -> None:
    names = ("keyring", "node-key", "keys.json", "logs/a/server.log", "engine_keys/a", "links/a.gguf")
    state = put(tmp_path, *names)
    (state / "models").mkdir()
    assert purge(tmp_path) == ""
    assert not state.exists()


@pytest.mark.parametrize("name", ["models/a.gguf", "big/a.gguf", "a.gguf", ".ollama/models/blobs/sha256-1"])
def test_purge_keeps_models_wherever_the_administrator_put_them(tmp_path: Path, name: str) -> None:
    state = put(tmp_path, "keyring", name)
    assert f"{state} is not empty and was kept" in purge(tmp_path)
    assert (state / name).exists() and not (state / "keyring").exists()


def test_purge_deletes_nothing_behind_a_link(tmp_path: Path) -> None:
    state = put(tmp_path, "keyring")
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/a.gguf").touch()
    (state / "models").symlink_to(tmp_path / "disk")
    purge(tmp_path)
    assert (tmp_path / "disk/a.gguf").exists() and (state / "models").is_symlink()
