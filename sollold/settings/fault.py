"""The error for invalid settings. Imports nothing, since commands that only query a daemon use it too."""

from __future__ import annotations


class SettingsError(Exception):
    """An invalid setting. The message names its location, the fault and the closest valid word."""
