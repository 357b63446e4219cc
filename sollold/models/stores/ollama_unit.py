"""Reads Ollama's systemd unit: the user that it runs as, and its environment."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

from sollold.models.stores.safe_read import read_text

UNITS = (
    "/etc/systemd/system/ollama.service",
    "/run/systemd/system/ollama.service",
    "/usr/lib/systemd/system/ollama.service",
    "/lib/systemd/system/ollama.service",
)


def ollama_service(units: Iterable[str] = UNITS) -> tuple[str, dict[str, str]]:
    """Return the user and environment of the systemd unit, including drop-ins; empty if there is none."""
    user = ""
    values: dict[str, str] = {}
    unit = next((Path(path) for path in units if Path(path).is_file()), None)
    if unit is None:
        return user, values
    dropins = sorted(Path("/etc/systemd/system/ollama.service.d").glob("*.conf"))
    if unit.parent != Path("/etc/systemd/system"):
        dropins = sorted(Path(f"{unit}.d").glob("*.conf")) + dropins
    else:
        dropins = sorted({*dropins, *Path(f"{unit}.d").glob("*.conf")})
    for path in (unit, *dropins):
        for line in read_text(path).splitlines():
            key, _, value = line.strip().partition("=")
            if key == "User":
                user = value.strip()
            elif key == "Environment":
                values.update(_assignments(value))
            elif key == "EnvironmentFile":
                values.update(_assignments(read_text(Path(value.strip().removeprefix("-"))), comments=True))
    return user, values


def _assignments(text: str, *, comments: bool = False) -> dict[str, str]:
    try:
        words = shlex.split(text, comments=comments)
    except ValueError:
        return {}
    return dict(word.split("=", 1) for word in words if "=" in word)
