"""Converts parts of a conversation to the form that both engines' ``/v1/chat/completions`` accept. Pure."""

from __future__ import annotations

import base64
import binascii
from collections import deque
from collections.abc import Callable
from typing import Any

from sollold.api.engine.left_out import UNSEEN_IMAGE
from sollold.errors import bad_image
from sollold.models.model import Model


def link_tool_results(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give every tool result the id of the call it answers; Ollama's clients name only the tool, or nothing.

    Calls and results are matched by id or name, else in their order.
    """
    open_calls = _OpenCalls()
    for message in messages:
        for call in message.get("tool_calls", ()):
            open_calls.add(call["id"], call["function"]["name"])
        if message["role"] != "tool":
            continue
        match = open_calls.take(message.get("tool_call_id"), message.get("name"))
        if match is not None:
            message.setdefault("tool_call_id", match[0])
            message.setdefault("name", match[1])
        else:
            message.setdefault("tool_call_id", "call_0")
    return messages


class _OpenCalls:
    """The calls without a result. Found by key, since a conversation may have thousands."""

    def __init__(self) -> None:
        self._calls: dict[int, tuple[str, str]] = {}
        self._numbers: dict[tuple[str, str | None], deque[int]] = {}
        """Numbers of calls by ("id", id), by ("name", name) and for all, in their order."""
        self._count = 0

    def add(self, id_: str, name: str) -> None:
        """Add a call."""
        self._calls[self._count] = id_, name
        for key in (("id", id_), ("name", name), _ALL_CALLS):
            self._numbers.setdefault(key, deque()).append(self._count)
        self._count += 1

    def take(self, id_: str | None, name: str | None) -> tuple[str, str] | None:
        """Remove the call with this id, without an id with this name, else the first; None for no call."""
        number = self._first(("id", id_) if id_ else ("name", name))
        if number is None:
            number = self._first(_ALL_CALLS)
        return self._calls.pop(number) if number is not None else None

    def _first(self, key: tuple[str, str | None]) -> int | None:
        numbers = self._numbers.get(key, ())
        while numbers and numbers[0] not in self._calls:
            numbers.popleft()
        return numbers[0] if numbers else None


_ALL_CALLS = ("", None)


def clean_base64(image: object) -> str:
    """Return an image's base64 as every decoder accepts it: no whitespace, standard alphabet, padded.

    ``image`` may be a ``data:`` URL, or bytes as numbers, as Node serializes a buffer (and Go reads it).

    Raises:
        Refusal: BAD_REQUEST if it is not base64, or empty.
    """
    text = image.strip() if isinstance(image, str) else _base64_of(image)
    if text[:5].lower() == "data:" and "," in text:
        text = text.split(",", 1)[1]
    text = "".join(text.split()).translate(_STANDARD).rstrip("=")
    if not text:
        raise bad_image("an image is empty")
    text += "=" * (-len(text) % 4)
    try:
        base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise bad_image("an image is not base64") from None
    return text


def _base64_of(image: object) -> str:
    numbers = image.get("data") if isinstance(image, dict) and image.get("type") == "Buffer" else image
    try:
        if isinstance(numbers, list):
            return base64.b64encode(bytes(numbers)).decode()
    except (TypeError, ValueError):
        pass
    raise bad_image("an image is not base64") from None


_STANDARD = str.maketrans("-_", "+/")


def image_part(image: object) -> dict[str, Any]:
    """Convert a base64 image, bare or a ``data:`` URL, to an ``image_url`` part, typed by its first bytes.

    Raises:
        Refusal: BAD_REQUEST if it is not base64.
    """
    text = clean_base64(image)
    kind = _image_kind(base64.b64decode(text[:64]))
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{text}"}}


def image_url_part(image: object) -> dict[str, Any]:
    """Convert an ``image_url``, a string or an object with ``url``, to a part.

    Raises:
        Refusal: BAD_REQUEST if it is neither, or its ``data:`` URL is not base64.
    """
    url = image.get("url") if isinstance(image, dict) else image
    text = url.strip() if isinstance(url, str) else ""
    scheme = text[:8].lower()
    if scheme.startswith("data:"):
        if ";base64," not in text[:200].lower():
            raise bad_image("an image_url with a data: URL must be base64")
        return image_part(text)
    if not scheme.startswith(("http://", "https://")):
        raise bad_image("an image_url needs a url: data:image/…;base64,… or http(s)://…")
    return {"type": "image_url", "image_url": {"url": text}}


def result_image_part(image: Callable[[], dict[str, Any]], model: Model) -> dict[str, Any]:
    """Return the part for an image in a tool's result; for a model without vision, a text in its place.

    An agent sends all results again with each request: if one were refused, it could never continue.

    Raises:
        Refusal: BAD_REQUEST, as ``image``.
    """
    return image() if "vision" in model.capabilities else {"type": "text", "text": UNSEEN_IMAGE}


def _image_kind(head: bytes) -> str:
    for magic, kind in ((b"\x89PNG", "png"), (b"GIF8", "gif"), (b"BM", "bmp")):
        if head.startswith(magic):
            return kind
    return "webp" if head[:4] == b"RIFF" and head[8:12] == b"WEBP" else "jpeg"
