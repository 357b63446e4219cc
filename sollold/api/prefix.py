"""The digest of a conversation's beginning, so that its next turn finds the engine that remembers it."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

_CHARACTERS = 4096


def prefix_of(messages: object) -> str:
    """16 hex digits over the messages up to the first of the user; empty when there is nothing to go by."""
    if isinstance(messages, str):
        start: list[Any] = [messages[:_CHARACTERS]]
    elif isinstance(messages, list):
        start = []
        for message in messages[:8]:
            if not isinstance(message, dict):
                return ""
            content = message.get("content")
            start.append(content[:_CHARACTERS] if isinstance(content, str) else content)
            if message.get("role") == "user":
                break
    else:
        return ""
    if not any(start):
        return ""
    return hashlib.blake2b(msgspec.json.encode(start)[: 4 * _CHARACTERS], digest_size=8).hexdigest()
