"""Validates the models in another node's list: their names, digests, numbers and sizes."""

from __future__ import annotations

import math
import re
from dataclasses import fields

from sollold.models.model import Model
from sollold.models.names import canonical

_DIGEST = re.compile(r"[0-9A-Za-z]{1,64}")
_MAX_BYTES = 2**60
"""Upper limit of every integer field, whether it counts bytes or not."""
_MAX_TEXT = 1 << 20
"""Maximum length of a template, system prompt, licence or parameters, in characters."""
_MAX_ITEMS = 4096
_TEXTS = frozenset(("template", "system", "license", "params"))
_MAX_LINE = 4096


def objection(model: Model) -> str:
    """Return why ``model`` can't be accepted from another node; empty if it can."""
    try:
        if canonical(model.name) != model.name:
            return "its name is not in its canonical form"
    except ValueError as error:
        return str(error)
    if not _DIGEST.fullmatch(model.digest) or (model.manifest and not _DIGEST.fullmatch(model.manifest)):
        return "its digest is invalid"
    for field in fields(model):
        value = getattr(model, field.name)
        if isinstance(value, tuple) and len(value) > _MAX_ITEMS:
            return f"it has {len(value)} {field.name}"
        if isinstance(value, int) and not 0 <= value <= _MAX_BYTES:
            return f"{field.name} is {value}"
        if isinstance(value, float) and not math.isfinite(value):
            return f"{field.name} is {value}"
        if isinstance(value, str) and len(value) > (_MAX_TEXT if field.name in _TEXTS else _MAX_LINE):
            return f"{field.name} has {len(value)} characters"
    return ""
