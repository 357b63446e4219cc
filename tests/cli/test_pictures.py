"""Paths of pictures in a question."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any, cast

import pytest

from sollold.cli.pictures import pictures_of, question
from sollold.client.blocking import BlockingClient


class _Daemon:
    def __init__(self, *capabilities: str) -> None:
        self._capabilities = capabilities

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        assert path == "/api/show"
        return {"capabilities": list(self._capabilities)}


def daemon(*capabilities: str) -> BlockingClient:
    return cast(BlockingClient, _Daemon(*capabilities))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("cat.png", "a dog.JPG"):
        (tmp_path / name).write_bytes(name.encode())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("text", "rest", "names"),
    [
        ("What is on ./cat.png?", "What is on ?", ["cat.png"]),
        ("~/cat.png", "", ["cat.png"]),
        (r"Compare ./cat.png ./a\ dog.JPG", "Compare", ["cat.png", "a dog.JPG"]),
        ("Is './cat.png' fine", "Is  fine", ["cat.png"]),
        ("./mouse.png", "./mouse.png", []),
        (f"/{'9j4AAQ' * 99}.png", f"/{'9j4AAQ' * 99}.png", []),
        ("cat.png and http://x/cat.png", "cat.png and http://x/cat.png", []),
    ],
)
def test_paths_of_existing_pictures_are_found(folder: Path, text: str, rest: str, names: list[str]) -> None:
    found, files = pictures_of(text)
    assert (found, [file.name for file in files]) == (rest, names)


def test_pictures_are_sent_to_a_vision_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "What is on ./cat.png?"
    seen = {
        "role": "user",
        "content": "What is on ?",
        "images": [base64.b64encode(b"cat.png").decode()],
    }
    assert question(daemon("completion", "vision"), "m", text) == seen
    assert "Added cat.png" in capsys.readouterr().err
    assert question(daemon("completion"), "m", text) == {"role": "user", "content": text}
