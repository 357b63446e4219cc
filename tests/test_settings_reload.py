"""Reloading the settings of a daemon."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sollold.daemon.app import Daemon
from sollold.settings.load import LoadedSettings, load
from sollold.settings.paths import Places
from sollold.settings.schema import Settings
from tests.doubles import until


async def test_reloads_follow_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = Places(tmp_path / "state", tmp_path / "cache")
    folders.make()
    daemon = Daemon(load(Path(os.devnull), {}), folders, demo=False)
    steps: list[str] = []

    async def apply(settings: Settings) -> None:
        steps.append(f"use {settings.serving.stall:.0f}")

    def read(stall: str) -> LoadedSettings:
        steps.append(f"read {stall}")
        return load(Path(os.devnull), {}, [("serving.stall", stall, "--set")])

    monkeypatch.setattr(daemon, "_apply_settings", apply)
    daemon.reload(lambda: read("100"))
    daemon.reload(lambda: read("200"))
    await until(lambda: len(steps) == 4)
    assert steps == ["read 100", "use 100", "read 200", "use 200"]
