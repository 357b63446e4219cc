"""The folders that a daemon writes to. Nothing else is written."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from sollold.facts import dataclass
from sollold.settings.location import expanded, home_folder, xdg_folder
from sollold.settings.schema import NodeSettings


@dataclass(frozen=True, slots=True)
class Places:
    """Folders of one daemon.

    Attributes:
        state: identity, terms, journal of children, known peers, logs: small, must be kept.
        cache: llama.cpp builds and workers' tensors: large, may be deleted at any time.
    """

    state: Path
    cache: Path

    def make(self) -> None:
        """Create the folders, readable only by their owner since they contain the identity.

        A state folder that others may enter, like the package's, also holds users' models. Its logs and JSON
        files are closed to others, including those that an older version left open.

        Raises:
            OSError: they can't be created or written.
        """
        self.state.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in (*self.state.glob("logs"), *self.state.glob("*.json")):
            with contextlib.suppress(OSError):
                if (mode := stat.S_IMODE(path.stat().st_mode)) & 0o077:
                    path.chmod(mode & 0o700)
        self.cache.mkdir(parents=True, exist_ok=True, mode=0o700)


def places(settings: NodeSettings) -> Places:
    """Return the folders from the settings, else from systemd, else in the user's home (XDG)."""
    return Places(
        _folder(settings.state_dir, "STATE_DIRECTORY", "XDG_STATE_HOME", ".local/state"),
        _folder(settings.cache_dir, "CACHE_DIRECTORY", "XDG_CACHE_HOME", ".cache"),
    )


def _folder(configured: str, systemd: str, xdg: str, default: str) -> Path:
    if configured:
        return expanded(configured).absolute()
    if value := os.environ.get(systemd):
        return Path(value.split(":")[0])
    return xdg_folder(os.environ, xdg, home_folder() / default) / "sollold"
