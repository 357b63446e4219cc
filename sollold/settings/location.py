"""Where the settings file is, and where a daemon with these settings listens.

Imports little, since commands that only query a daemon start with it.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path

from sollold.settings.read_file import read_file

HTTP_PORT = 11435
"""Default port of the HTTP API."""
FILE_VARIABLE = "SOLLOLD_CONFIG"


def home_folder() -> Path:
    """Return the user's home folder, or the root folder if there is none, as for some container uids."""
    try:
        return Path.home()
    except RuntimeError:
        return Path("/")


def xdg_folder(environ: Mapping[str, str], variable: str, default: Path) -> Path:
    """Return the folder in ``variable``, or ``default``. XDG requires to ignore a relative path."""
    folder = Path(environ.get(variable, ""))
    return folder if folder.is_absolute() else default


def own_settings() -> Path:
    """Return this user's configuration folder (XDG)."""
    return xdg_folder(os.environ, "XDG_CONFIG_HOME", home_folder() / ".config")


def cache_home(environ: Mapping[str, str], home: Path) -> Path:
    """Return the user's folder for caches; ``home``: the user's home folder."""
    return xdg_folder(environ, "XDG_CACHE_HOME", home / ".cache")


def expanded(path: str | Path) -> Path:
    """Expand ``~`` in ``path``; return it unchanged if that home folder does not exist."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def candidates() -> list[Path]:
    """Return the default locations of the settings file, in order of precedence."""
    places = [own_settings() / "sollold" / "sollold.toml", Path("/etc/sollold/sollold.toml")]
    if folder := os.environ.get("CONFIGURATION_DIRECTORY"):
        places.insert(0, Path(folder.split(":")[0]) / "sollold.toml")
    return places


def local_address(environment: Mapping[str, str] | None = None) -> tuple[str, int] | None:
    """Return host and port of this machine's daemon by the settings; None if that takes a full `load`.

    Files that this user may not read are skipped: they may contain the cluster's token.
    """
    variables = os.environ if environment is None else environment
    http: object = {}
    configured = variables.get(FILE_VARIABLE)
    for file in [Path(configured)] if configured else candidates():
        try:
            # Editors on Windows may write a byte order mark.
            http = tomllib.loads(read_file(file).decode("utf-8-sig")).get("http", {})
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            if configured:
                return None
            continue
        except (OSError, ValueError, RecursionError):
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
    """Return the address by which a server listening on ``host`` can be reached."""
    return {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
