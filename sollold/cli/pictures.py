"""Pictures named by their paths in a question, as in Ollama's command line: ``What is on ./cat.png?``"""

from __future__ import annotations

import base64
import os
import re
import sys
from pathlib import Path
from typing import Any

from sollold.cli.streams import harmless
from sollold.client.blocking import BlockingClient
from sollold.client.errors import ClientError
from sollold.errors import system_reason
from sollold.settings.location import expanded

_PATH = re.compile(
    r"(?<!\S)(?P<quote>['\"]?)(?P<path>(?:~|\.{1,2})?/(?:\\ |[^\s\\])*?\.(?:jpe?g|png|webp))(?P=quote)"
    r"(?=[\s?!.,;:)]|$)",
    re.IGNORECASE,
)


def question(daemon: BlockingClient, model: str, text: str) -> dict[str, Any]:
    """The message for ``text``, with the pictures it names if the model has vision."""
    rest, files = pictures_of(text)
    if not files or not _has_vision(daemon, model):
        return {"role": "user", "content": text}
    images = []
    for file in files:
        try:
            images.append(base64.b64encode(file.read_bytes()).decode())
        except OSError as error:
            print(f"sollold: {harmless(f'{file}: {system_reason(error)}')}", file=sys.stderr)
            return {"role": "user", "content": text}
        print(f"Added {harmless(str(file))}", file=sys.stderr)
    return {"role": "user", "content": rest, "images": images}


def pictures_of(text: str) -> tuple[str, list[Path]]:
    """Split ``text`` into the text without paths of existing pictures, and those paths."""
    files: list[Path] = []

    def take(found: re.Match[str]) -> str:
        file = expanded(found["path"].replace("\\ ", " "))
        # Unlike `Path.is_file`, false for a name that is too long, or in a folder of another user.
        if not os.path.isfile(file):  # noqa: PTH113
            return found[0]
        files.append(file)
        return ""

    return _PATH.sub(take, text).strip(), files


def _has_vision(daemon: BlockingClient, model: str) -> bool:
    try:
        return "vision" in daemon.post("/api/show", {"model": model}).get("capabilities", [])
    except ClientError:
        return False  # the request itself will report why
