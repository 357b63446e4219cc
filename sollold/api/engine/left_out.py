"""Texts that replace documents and images that were left out, and warnings about them. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

_UNREAD = "was left out here: this server reads plain text only.]"
UNSEEN_IMAGE = "[An image was left out here: this model can't see images.]"
_TOOL = ("tool", "function")
"""Roles of messages with the result of a tool."""


def unread_document(title: object) -> str:
    """Return the text that replaces a document for the model."""
    name = f" ({title[:200]})" if isinstance(title, str) and title else ""
    return f"[A document{name} {_UNREAD}"


def are_results(messages: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Return for each message of a chat whether its images come from a tool.

    OpenAI's tool messages have no images, so agents (Cline, pi, opencode) send them in a user message
    directly after the results.
    """
    roles = ["", *(str(message.get("role")).strip().lower() for message in messages)]
    return [role in _TOOL or (role == "user" and last in _TOOL) for last, role in itertools.pairwise(roles)]


def left_out_warnings(messages: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return warnings about what was left out of a conversation.

    An agent (Claude Code) sends a PDF that it has read, and the images in all results, again with each
    request: if these were refused, it could never continue.
    """
    image = document = False
    for message, result in zip(messages, are_results(messages), strict=True):
        content = message.get("content")
        for part in content if isinstance(content, list) else (content,):
            text = part.get("text") if isinstance(part, dict) else part
            if isinstance(text, str):
                document = document or _UNREAD in text
                image = image or (result and UNSEEN_IMAGE in text)
    warnings = []
    if image:
        warnings.append("an image in a tool's result is left out: the model does not support images")
    if document:
        warnings.append("a document is left out: only plain text is read")
    return tuple(warnings)
