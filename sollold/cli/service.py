"""The service of this machine's daemon: the system's, or this user's own (`sollold install --user`)."""

from __future__ import annotations

import os
from pathlib import Path

from sollold.settings.location import own_settings


def unit_file() -> Path:
    """Where this user's systemd reads the unit."""
    return own_settings() / "systemd/user/sollold.service"


def systemctl() -> list[str]:
    """The command that asks about the service, to which its words are added."""
    return ["systemctl", *_user()]


def journalctl() -> list[str]:
    """The command that reads what the daemon logged, to which its options are added."""
    return ["journalctl", *_user(), "-u", "sollold"]


def _user() -> list[str]:
    """Root has the system's service, whatever lies in its home."""
    return ["--user"] if os.geteuid() and unit_file().exists() else []
