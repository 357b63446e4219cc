"""Documents in a conversation: plain text is read, of all others a note tells the model. Pure."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

from sollold.errors import Fault, Refusal

_UNREAD = "was left out here: this server reads plain text only.]"


def unread_document(title: object) -> str:
    """What the model is told in place of a document."""
    named = f" ({title[:200]})" if isinstance(title, str) and title else ""
    return f"[A document{named} {_UNREAD}"


def unread_warnings(messages: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """That a document was left out.

    An agent (Claude Code) sends a PDF that it has read again with each request: refused, it would never go
    on.
    """
    contents = (message.get("content") for message in messages)
    texts = (
        part.get("text") for one in contents for part in (one if isinstance(one, list) else [{"text": one}])
    )
    if not any(isinstance(text, str) and _UNREAD in text for text in texts):
        return ()
    return ("a document is left out: only plain text is read",)


def file_part(file: object) -> dict[str, Any]:
    """A file as OpenAI's clients send it (``file_data``, ``file_url`` or ``file_id``) as a part with text.

    Raises:
        Refusal: BAD_REQUEST when it is none of these.
    """
    fields = ("file_data", "file_url", "file_id")
    if not isinstance(file, dict) or not any(isinstance(file.get(name), str) for name in fields):
        raise Refusal(Fault.BAD_REQUEST, f"a file needs {', '.join(fields[:2])} or {fields[2]}")
    title, text = file.get("filename"), _plain_text(file.get("file_data"))
    if text is None:
        return {"type": "text", "text": unread_document(title)}
    return {"type": "text", "text": f"{title}:\n{text}" if isinstance(title, str) and title else text}


def _plain_text(data: object) -> str | None:
    """The text in base64, bare or as a ``data:`` URL; None for what is no text."""
    if not isinstance(data, str):
        return None
    if data[:5].lower() == "data:":
        data = data.partition(",")[2]
    try:
        text = base64.b64decode("".join(data.split()), validate=True).decode()
    except (binascii.Error, ValueError):
        return None
    return None if text.startswith("%PDF") or "\0" in text else text
