"""The systemd service of this machine's daemon: system-wide, or the user's (`sollold install --user`)."""

from __future__ import annotations

import os
from pathlib import Path

from sollold.settings.location import own_settings


def unit_file() -> Path:
    """Path of the unit in this user's systemd."""
    return own_settings() / "systemd/user/sollold.service"


def systemctl() -> list[str]:
    """The systemctl command, with its option for the user's service if needed; append arguments."""
    return ["systemctl", *_user_option()]


def journalctl() -> list[str]:
    """The journalctl command for the daemon's log; append options."""
    return ["journalctl", *_user_option(), "-u", "sollold"]


def _user_option() -> list[str]:
    """The option for the user's own service, if it exists; root always uses the system's."""
    return ["--user"] if os.geteuid() and unit_file().exists() else []
