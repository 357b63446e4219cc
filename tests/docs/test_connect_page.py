"""The dashboard's connection page agrees with the documentation."""

from __future__ import annotations

import re

from tests.docs.pages import FOLDER

SCRIPT = FOLDER.parent / "sollold" / "api" / "web" / "connect.js"


def test_the_context_settings_of_claude_code_and_codex_agree() -> None:
    page, script = (FOLDER / "clients.md").read_text("utf-8"), SCRIPT.read_text("utf-8")
    lines = re.findall(r"^(?:export \w+=|model_context_window = )\d+$", page, re.MULTILINE)
    assert len(lines) == 3
    assert all(line in script for line in lines)
