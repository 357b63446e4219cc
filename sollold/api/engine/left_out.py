"""Plain-text documents, texts that replace other documents and images, and warnings about these. Pure."""

from __future__ import annotations

import base64
import binascii
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from sollold.errors import bad_request

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
    roles = ["", *[str(message.get("role")).strip().lower() for message in messages]]
    return [role in _TOOL or (role == "user" and last in _TOOL) for last, role in itertools.pairwise(roles)]


def left_out_warnings(messages: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return warnings about what was left out of a conversation.

    An agent (Claude Code) sends a PDF that it has read, and the images in all results, again with each
    request: if these were refused, it could never continue.
    """
    image = document = False
    results: list[bool] = []
    for index, message in enumerate(messages):
        content = message.get("content")
        for part in content if isinstance(content, list) else (content,):
            text = part.get("text") if isinstance(part, dict) else part
            if not isinstance(text, str):
                continue
            document = document or _UNREAD in text
            if UNSEEN_IMAGE in text:
                results = results or are_results(messages)
                image = image or results[index]
    warnings = []
    if image:
        warnings.append("an image in a tool's result is left out: the model does not support images")
    if document:
        warnings.append("a document is left out: only plain text is read")
    return tuple(warnings)


def file_part(file: object) -> dict[str, Any]:
    """Convert a file as OpenAI's clients send it (``file_data``, ``file_url`` or ``file_id``) to a text part.

    Raises:
        Refusal: BAD_REQUEST if it has none of these fields.
    """
    fields = ("file_data", "file_url", "file_id")
    if not isinstance(file, dict) or not any(isinstance(file.get(name), str) for name in fields):
        raise bad_request(f"a file needs {', '.join(fields[:2])} or {fields[2]}")
    title, text = file.get("filename"), _plain_text(file.get("file_data"))
    if text is None:
        return {"type": "text", "text": unread_document(title)}
    return {"type": "text", "text": f"{title}:\n{text}" if isinstance(title, str) and title else text}


def _plain_text(data: object) -> str | None:
    """Decode text in base64, bare or as a ``data:`` URL; None if it is not plain text."""
    if not isinstance(data, str):
        return None
    if data[:5].lower() == "data:":
        data = data.partition(",")[2]
    try:
        text = base64.b64decode("".join(data.split()), validate=True).decode()
    except (binascii.Error, ValueError):
        return None
    return None if text.startswith("%PDF") or "\0" in text else text
