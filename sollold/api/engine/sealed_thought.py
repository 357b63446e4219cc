"""Thinking in a field that clients do not read and send back as it is. Pure."""

from __future__ import annotations

import base64

_SEAL = "sollold:"


def sealed(thought: str) -> str:
    """A thought as ``encrypted_content`` or ``signature``. It is hidden from nobody."""
    return _SEAL + base64.b64encode(thought.encode()).decode()


def unsealed(content: object) -> str:
    """The thought in such a field of ours; empty for another's."""
    if not isinstance(content, str) or not content.startswith(_SEAL):
        return ""
    try:
        return base64.b64decode(content.removeprefix(_SEAL)).decode()
    except ValueError:
        return ""
