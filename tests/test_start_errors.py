"""Error messages of a daemon that can't write or read its files at the start."""

from __future__ import annotations

import errno
import os
import pwd
from pathlib import Path
from types import SimpleNamespace

import pytest

from sollold.daemon.main import _describe, _locked
from sollold.settings.paths import Places
from sollold.settings.state_file import write_whole


def test_a_full_disk_is_reported_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as caught:
        write_whole(tmp_path / "node-key", b"x")
    places = Places(tmp_path / "state", tmp_path / "cache")
    assert _describe(caught.value, places) == f"No space left on device: {tmp_path / 'node-key'}"
    assert list(tmp_path.iterdir()) == []


def test_unfinished_files_of_killed_daemons_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = Places(tmp_path / "state", tmp_path / "cache")
    places.make()
    monkeypatch.setattr(Path, "replace", _killed)
    monkeypatch.setattr(Path, "unlink", _killed)
    with pytest.raises(SystemExit):
        write_whole(places.state / "keyring", b"secret")
    monkeypatch.undo()
    (places.state / "notes.new").touch()
    assert len(list(places.state.iterdir())) == 2
    with _locked(places):
        assert sorted(path.name for path in places.state.iterdir()) == ["lock", "notes.new"]


def _killed(*_: object) -> None:
    raise SystemExit


def test_a_file_of_another_user_is_reported_with_the_chown_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "node-key"
    file.touch()
    places = Places(tmp_path, tmp_path / "cache")
    error = PermissionError(errno.EACCES, "Permission denied", str(file))
    assert _describe(error, places) == f"Permission denied: {file}", "the file belongs to this user"
    monkeypatch.setattr(os, "geteuid", lambda: file.stat().st_uid + 1)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: SimpleNamespace(pw_name="sollold"))
    assert _describe(error, places) == (
        f"Permission denied: {file}; it belongs to another user: sudo chown -R sollold: {tmp_path}"
    )


def test_a_full_disk_without_a_file_name_is_reported_with_the_state_folder(tmp_path: Path) -> None:
    places = Places(tmp_path / "state", tmp_path / "cache")
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert _describe(error, places) == f"No space left on device: {tmp_path / 'state'}"
    assert _describe(OSError(errno.EADDRINUSE, "Address in use"), places) == "Address in use"
