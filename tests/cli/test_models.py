"""The list of models that the command prints."""

from __future__ import annotations

import argparse
import sys
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


def test_a_list_without_usable_models_says_how_to_see_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unusable = {
        "name": "a:latest",
        "size": 1,
        "details": {"parameter_size": "0"},
        "unusable": "It is damaged.",
    }

    class Unreadable:
        def get(self, path: str) -> dict[str, Any]:
            return {"models": [unusable] if "unusable" in path else []}

    monkeypatch.setattr(models, "client", lambda options: Unreadable())
    models.models(argparse.Namespace(all=False, json=False, quiet=False))
    assert capsys.readouterr().out == "can't use the only model: `sollold models --all` says why\n"
    models.models(argparse.Namespace(all=True, json=False, quiet=False))
    assert capsys.readouterr().out.splitlines()[-1].split() == ["a:latest", "1", "B", "It", "is", "damaged."]


def test_the_reason_why_a_model_is_not_usable_is_whole_on_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = "The file is damaged: it ends before its tensors do; download it again."

    class Damaged:
        def get(self, path: str) -> dict[str, Any]:
            return {"models": [{"name": "a:latest", "size": 1, "unusable": reason}]}

    monkeypatch.setattr(models, "client", lambda options: Damaged())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    models.models(argparse.Namespace(all=True, json=False, quiet=False))
    assert reason in capsys.readouterr().out
