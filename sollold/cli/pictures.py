"""Pictures whose paths stand in a question, as Ollama's command line takes them: ``What is on ./cat.png?``"""

from __future__ import annotations

import base64
import re
import sys
from pathlib import Path
from typing import Any

from sollold.cli.streams import harmless
from sollold.client.blocking import BlockingClient
from sollold.client.errors import ClientError
from sollold.settings.location import expanded

_PATH = re.compile(
    r"(?<!\S)(?P<quote>['\"]?)(?P<path>(?:~|\.{1,2})?/(?:\\ |[^\s\\])*?\.(?:jpe?g|png|webp))(?P=quote)"
    r"(?=[\s?!.,;:)]|$)",
    re.IGNORECASE,
)


def question(daemon: BlockingClient, model: str, text: str) -> dict[str, Any]:
    """The message that asks ``text``, with the pictures that it names where the model sees."""
    rest, files = pictures_of(text)
    if not files or not _sees(daemon, model):
        return {"role": "user", "content": text}
    images = []
    for file in files:
        try:
            images.append(base64.b64encode(file.read_bytes()).decode())
        except OSError as error:
            print(f"sollold: {harmless(f'{file}: {error.strerror}')}", file=sys.stderr)
            return {"role": "user", "content": text}
        print(f"Added {harmless(str(file))}", file=sys.stderr)
    return {"role": "user", "content": rest, "images": images}


def pictures_of(text: str) -> tuple[str, list[Path]]:
    """``text`` without the paths of pictures that exist, and these."""
    files: list[Path] = []

    def take(found: re.Match[str]) -> str:
        file = expanded(found["path"].replace("\\ ", " "))
        if not file.is_file():
            return found[0]
        files.append(file)
        return ""

    return _PATH.sub(take, text).strip(), files


def _sees(daemon: BlockingClient, model: str) -> bool:
    try:
        return "vision" in daemon.post("/api/show", {"model": model}).get("capabilities", [])
    except ClientError:
        return False  # the question itself tells why
