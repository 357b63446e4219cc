"""Rewrites requests for an Ollama whose meaning is clear but which Go's types reject. Pure.

An Ollama answers 500 for a quoted option, and 400 for a call's arguments as a string, for ``data:`` URLs and
for ``think`` as a quoted boolean. It takes a context of size 0 for one of a few tokens.
"""

from __future__ import annotations

from typing import Any

import msgspec

from sollold.api.engine.calls import typed_body
from sollold.api.engine.fields import stop_list
from sollold.api.engine.messages import clean_base64
from sollold.api.engine.ollama_tools import readable_tools
from sollold.api.engine.tools import normalize_tool_call, normalize_tools
from sollold.api.ollama.request import Shared, format_of, parse_options, think_of

_OWN_FIELDS = ("resume", "placement", "priority", "timeout")


def native_body(body: dict[str, Any], parsed: Shared) -> dict[str, Any]:
    """Return ``body``, decoded as ``parsed``, for an Ollama's ``/api/chat`` or ``/api/generate``.

    Raises:
        Refusal: BAD_REQUEST if the meaning of a field is unclear.
    """
    fields = {key: value for key, value in body.items() if value is not None and key not in _OWN_FIELDS}
    out = typed_body(fields, parsed)
    _set(out, "options", _options(parsed))
    _set(out, "format", format_of(parsed.format))
    _set(out, "think", think_of(parsed.think))
    # Fields that this endpoint does not define were not checked; an Ollama ignores them.
    checked = {name for name in parsed.__struct_fields__ if out.get(name)}
    if "images" in checked:
        out["images"] = [clean_base64(image) for image in out["images"]]
    if "tools" in checked:
        out["tools"] = readable_tools(normalize_tools(out["tools"]))
    if "messages" in checked:
        out["messages"] = [_message(message) for message in out["messages"]]
    return out


def _set(body: dict[str, Any], name: str, value: Any) -> None:
    """Set a field, or remove it if ``value`` is None."""
    body.pop(name, None)
    if value is not None:
        body[name] = value


def _options(parsed: Shared) -> dict[str, Any] | None:
    if parsed.options is None:
        return None
    typed = msgspec.to_builtins(parse_options(parsed.options, None))
    options = {key: value for key, value in parsed.options.items() if value is not None} | typed
    if "stop" in options:
        _set(options, "stop", stop_list(options["stop"]) or None)
    context = options.get("num_ctx")
    if isinstance(context, int) and context <= 0:
        del options["num_ctx"]
    return dict(options)


def _message(raw: dict[str, Any]) -> dict[str, Any]:
    message = {key: value for key, value in raw.items() if value is not None}
    role = str(message.get("role") or "").strip().lower()
    message["role"] = {"function": "tool", "": "user"}.get(role, role)
    message.setdefault("content", "")
    if message["role"] == "tool" and "name" in message:
        message.setdefault("tool_name", message["name"])
    if "images" in message:
        message["images"] = [clean_base64(image) for image in message["images"]]
    if "tool_calls" in message:
        message["tool_calls"] = [_call(call, index) for index, call in enumerate(message["tool_calls"])]
    return message


def _call(call: Any, index: int) -> dict[str, Any]:
    """Return a call with its arguments as an object."""
    normalized = normalize_tool_call(call, index)
    arguments = msgspec.json.decode(normalized["function"]["arguments"])
    return {**normalized, "function": {**normalized["function"], "arguments": arguments}}
