"""What the settings say of models whose file no node has yet. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from sollold.config import ModelProfile
from sollold.models.names import canonical

_BYTES_A_WEIGHT = 0.7
"""Of the usual 4-bit quantizations, context and buffers included."""


def profile_of(profiles: Mapping[str, ModelProfile], name: str) -> ModelProfile | None:
    """The profile of a model, however its name is written; None when the settings have none."""
    wanted = _plain(name)
    return next((profile for known, profile in profiles.items() if _plain(known) == wanted), None)


def needed(profile: ModelProfile) -> int:
    """Bytes that the model takes, guessed from its weights where the profile does not say; 0: not known."""
    return profile.memory or int(profile.parameters * 1e9 * _BYTES_A_WEIGHT)


def _plain(name: str) -> str:
    try:
        return canonical(name).lower()
    except ValueError:
        return name.lower()
