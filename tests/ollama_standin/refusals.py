"""Refusals of a real Ollama by status and text, or None for a valid body.

They were observed on an Ollama that runs llama-server, which reports errors as JSON within the text.
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any

_THINK = ("high", "medium", "low", "max")
EFFORTS = ("minimal", "low", "medium", "high", "xhigh", "ultra", "max", "none")
"""Valid values of ``reasoning_effort``."""
Wrong = tuple[int, str] | None


def engine_error(message: str, kind: str = "invalid_request_error", **more: Any) -> str:
    """Return an error of Ollama's llama-server as JSON."""
    error = {"code": 400, "message": message, "type": kind, **more}
    return json.dumps({"error": error}, separators=(",", ":"))


def check_inference(body: dict[str, Any], *, sees: bool) -> Wrong:
    """Check a chat or a prompt. ``sees``: the model accepts images."""
    think, format_, rivals = body.get("think"), body.get("format"), body.get("top_logprobs") or 0
    if isinstance(think, str) and think not in _THINK:
        known = ", ".join(f'"{level}"' for level in _THINK)
        return 400, f'invalid think value: "{think}" (must be {known}, true, or false)'
    if not 0 <= rivals <= 20:
        return 400, "top_logprobs must be between 0 and 20"
    if body.get("raw") and (body.get("template") or body.get("system") or body.get("context")):
        return 400, "raw mode does not support template, system, or context"
    if format_ not in (None, "", "json") and not isinstance(format_, dict):
        named = json.dumps(json.dumps(format_))
        return 500, f'invalid format: {named}; expected "json" or a valid JSON Schema object'
    return check_images(body, sees=sees) or check_tools(body.get("tools"))


def check_images(body: dict[str, Any], *, sees: bool) -> Wrong:
    """Check the images of the body and its messages."""
    for holder in (body, *(body.get("messages") or ())):
        for image in holder.get("images") or ():
            try:
                base64.b64decode(image, validate=True)
            except (binascii.Error, ValueError):
                return 400, f"illegal base64 data at input byte {_invalid_position(image)}"
            if not sees:
                message = "Multimodal data provided, but model does not support multimodal requests."
                return 400, engine_error(message)
    return None


def _invalid_position(text: str) -> int:
    fine = (index for index, letter in enumerate(text) if not (letter.isalnum() or letter in "+/="))
    return next(fine, len(text))


def check_tools(tools: Any) -> Wrong:
    """Check tools. Missing fields reach the engine as null, and it requires properties."""
    for tool in tools or ():
        parameters = tool["function"].get("parameters") or {}
        if not isinstance(parameters.get("properties"), dict):
            message = "JSON schema error at #: properties must be an object"
            reason = "Unable to generate parser for this template. Automatic parser generation failed"
            return 400, engine_error(f"{reason}: {message}")
    return None


def check_embedding(texts: Any) -> Wrong:
    """Check ``input`` of an embedding request."""
    several = texts if isinstance(texts, list) else [texts]
    if texts is not None and not all(isinstance(text, str) for text in several):
        return 400, "invalid input type"
    if isinstance(texts, list) and "" in texts:
        return 400, "input exceeds maximum context length and cannot be truncated further"
    return None
