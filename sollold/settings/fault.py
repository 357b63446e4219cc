"""What is said of a setting that can't be. Imports nothing: commands that only ask a daemon have it too."""

from __future__ import annotations


class SettingsError(Exception):
    """A setting that can't be. The message names the place, the fault and the nearest right word."""
