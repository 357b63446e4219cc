"""The list of models that the command prints."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from sollold.cli import models


class Daemon:
    """A daemon that lists models by name as strings compare."""

    def get(self, path: str) -> dict[str, Any]:
        names = ("Qwen-10:latest", "gemma:latest", "qwen-2:latest", "qwen-9:latest")
        return {"models": [{"name": name, "size": 1} for name in names]}


@pytest.mark.parametrize("quiet", [False, True])
def test_models_are_listed_in_natural_order(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, quiet: bool
) -> None:
    monkeypatch.setattr(models, "client", lambda options: Daemon())
    models.models(argparse.Namespace(all=False, json=False, quiet=quiet))
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split()[0] for line in lines if ":latest" in line]
    assert listed == ["gemma:latest", "qwen-2:latest", "qwen-9:latest", "Qwen-10:latest"]
