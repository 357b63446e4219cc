"""Profiles of models by name: estimates for models that no node has, and overrides by users."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

MODEL_PROFILES: dict[str, dict[str, Any]] = {
    "llama3.2": {"parameter_count": 3, "estimated_memory_gb": 2.5, "requires_distributed": False},
    "phi": {"parameter_count": 3, "estimated_memory_gb": 2.2, "requires_distributed": False},
    "llama3.1:8b": {"parameter_count": 8, "estimated_memory_gb": 6, "requires_distributed": False},
    "codellama:13b": {"parameter_count": 13, "estimated_memory_gb": 9, "requires_distributed": False},
    "mixtral:8x7b": {"parameter_count": 47, "estimated_memory_gb": 28, "requires_distributed": True},
    "llama3.1:70b": {"parameter_count": 71, "estimated_memory_gb": 44, "requires_distributed": True},
    "llama3.1:405b": {"parameter_count": 406, "estimated_memory_gb": 245, "requires_distributed": True},
}
"""Model → ``parameter_count`` (billions), ``estimated_memory_gb``, ``requires_distributed``.

The predefined profiles are used only for models that the cluster does not have; for others the file decides.
Profiles added or changed by the user always apply.
"""

_ORIGINALS = copy.deepcopy(MODEL_PROFILES)


def plain_name(model: str) -> str:
    """A model's name for comparison: case-folded, without ``:latest``."""
    return model.strip().lower().removesuffix(":latest")


def profile_of(model: str) -> Mapping[str, Any] | None:
    """The profile of a model; any spelling of its name will do."""
    wanted = plain_name(model)
    return next((profile for name, profile in MODEL_PROFILES.items() if plain_name(name) == wanted), None)


def wanted_by_user(model: str) -> Mapping[str, Any] | None:
    """The profile of a model, if the user added or changed it."""
    profile = profile_of(model)
    return None if profile in _ORIGINALS.values() and _is_original(model) else profile


def _is_original(model: str) -> bool:
    wanted = plain_name(model)
    return any(
        plain_name(name) == wanted and MODEL_PROFILES.get(name) == profile
        for name, profile in _ORIGINALS.items()
    )
