"""Converts one message of an OpenAI chat, with its content parts, to the form that engines accept. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from sollold.api.engine.fields import require_capability
from sollold.api.engine.left_out import file_part
from sollold.api.engine.messages import image_url_part, result_image_part
from sollold.errors import bad_request
from sollold.models.model import Model

_PARTS = ("text", "file", "image_url", "input_audio", "input_video", "video_url")


def chat_message(message: dict[str, Any], model: Model, *, result: bool = False) -> dict[str, Any]:
    """Return a chat message in the form that engines accept. ``result``: its images come from a tool.

    Raises:
        Refusal: BAD_REQUEST if the message is ambiguous, or needs something that the model can't do.
    """
    out = {key: value for key, value in message.items() if value is not None}
    role = out.get("role")
    if not isinstance(role, str):
        raise bad_request("every message needs a role")
    role = out["role"] = role.strip().lower()
    if "reasoning" in out and "reasoning_content" not in out:
        out["reasoning_content"] = out.pop("reasoning")
    content = out.get("content")
    if content is None:
        out["content"] = ""
        if role == "assistant" and isinstance(refusal := out.pop("refusal", None), str):
            out["content"] = refusal
    elif isinstance(content, dict) and role in ("tool", "function") and "type" not in content:
        out["content"] = msgspec.json.encode(content).decode()
    elif isinstance(content, list | dict):
        out["content"] = [_part(part) for part in ([content] if isinstance(content, dict) else content)]
        if result:
            out["content"] = [_result_part(part, model) for part in out["content"]]
        for part in out["content"]:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in _PARTS:
                raise bad_request(
                    f"unsupported content part of type {str(kind)[:40]!r}; it must be {', '.join(_PARTS)}"
                )
            if kind == "text" and not isinstance(part.get("text"), str):
                raise bad_request("a part of type 'text' needs a text, which must be a string")
            if kind == "image_url":
                require_capability(model, "vision", "images")
                part["image_url"] = image_url_part(part.get("image_url"))["image_url"]
            # A vision model's projector may take sound as well; only the engine knows.
            if kind == "input_audio" and "vision" not in model.capabilities:
                require_capability(model, "audio", "audio input")
            if kind in ("input_video", "video_url"):
                require_capability(model, "vision", "video input")
    elif not isinstance(content, str):
        raise bad_request("a message's content must be a string or a list of parts")
    return out


def _result_part(part: Any, model: Model) -> Any:
    is_image = isinstance(part, dict) and part.get("type") == "image_url"
    return result_image_part(lambda: dict(part), model) if is_image else part


def _part(part: Any) -> Any:
    """Return a content part as llama-server accepts it, from a bare string or a part of either API."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    if kind == "refusal":
        return {"type": "text", "text": part.get("refusal")}
    if kind in ("input_text", "output_text", None) and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind in ("file", "input_file"):
        return file_part(part.get("file", part))
    if kind == "input_image":
        return {"type": "image_url", "image_url": part.get("image_url")}
    return dict(part)
