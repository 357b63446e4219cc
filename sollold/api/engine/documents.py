"""Reads plain-text documents in a conversation, and replaces all others by a note to the model. Pure."""

from __future__ import annotations

import base64
import binascii
from typing import Any

from sollold.api.engine.left_out import unread_document
from sollold.errors import Fault, Refusal


def file_part(file: object) -> dict[str, Any]:
    """Convert a file as OpenAI's clients send it (``file_data``, ``file_url`` or ``file_id``) to a text part.

    Raises:
        Refusal: BAD_REQUEST if it has none of these fields.
    """
    fields = ("file_data", "file_url", "file_id")
    if not isinstance(file, dict) or not any(isinstance(file.get(name), str) for name in fields):
        raise Refusal(Fault.BAD_REQUEST, f"a file needs {', '.join(fields[:2])} or {fields[2]}")
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
