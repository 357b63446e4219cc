"""Puts thinking into an opaque field, which clients send back unchanged. Pure."""

from __future__ import annotations

import base64

_SEAL = "sollold:"


def sealed(thought: str) -> str:
    """Encode a thought for ``encrypted_content`` or ``signature``. It is not encrypted."""
    return _SEAL + base64.b64encode(thought.encode()).decode()


def unsealed(content: object) -> str:
    """Decode the thought in such a field; empty if the field is another server's."""
    if not isinstance(content, str) or not content.startswith(_SEAL):
        return ""
    try:
        return base64.b64decode(content.removeprefix(_SEAL)).decode()
    except ValueError:
        return ""
