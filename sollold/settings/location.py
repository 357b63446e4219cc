"""Floor 0: where the settings file is, and where a daemon with these settings listens.

Imports little, since commands that only ask a daemon start with it.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path

from sollold.settings.read_file import read_file

HTTP_PORT = 11435
"""Where people and programs reach a node, if nothing else is set."""
FILE_VARIABLE = "SOLLOLD_CONFIG"


def home_folder() -> Path:
    """The user's home folder; the root folder where a user has none, as one of a container by its number."""
    try:
        return Path.home()
    except RuntimeError:
        return Path("/")


def own_settings() -> Path:
    """The folder of this user's own settings of all programs."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or home_folder() / ".config")


def expanded(path: str | Path) -> Path:
    """``path`` with ``~`` as the home folder; as it is where there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def candidates() -> list[Path]:
    """Where the file is looked for when none is named; the first that exists is read."""
    places = [own_settings() / "sollold" / "sollold.toml", Path("/etc/sollold/sollold.toml")]
    if folder := os.environ.get("CONFIGURATION_DIRECTORY"):
        places.insert(0, Path(folder.split(":")[0]) / "sollold.toml")
    return places


def local_address(environment: Mapping[str, str] | None = None) -> tuple[str, int] | None:
    """Host and port of this machine's daemon by the settings; None where only all of `load` can tell.

    A file that this user may not read is passed over: it may have the cluster's token in it.
    """
    variables = os.environ if environment is None else environment
    http: object = {}
    named = variables.get(FILE_VARIABLE)
    for file in [Path(named)] if named else candidates():
        try:
            # Editors of Windows begin a file with a mark of its encoding.
            http = tomllib.loads(read_file(file).decode("utf-8-sig")).get("http", {})
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            if named:
                return None
            continue
        except (OSError, ValueError):
            return None
        break
    if not isinstance(http, dict):
        return None
    host = variables.get("SOLLOLD_HTTP_HOST") or http.get("host", "")
    port = variables.get("SOLLOLD_HTTP_PORT") or http.get("port", HTTP_PORT)
    if not isinstance(host, str) or not str(port).isdecimal():
        return None
    return reachable(host), int(port)


def reachable(host: str) -> str:
    """The address that reaches who listens on ``host``."""
    return {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
