"""Answers to requests with the deprecated ``functions``, which allow one call, in ``function_call``. Pure."""

from __future__ import annotations

import msgspec


def with_function_call(raw: bytes) -> bytes:
    """Return a chunk or a whole answer with its first tool call as ``function_call``, without the others.

    Unchanged if there is no tool call, or it can't be parsed.
    """
    if b'"tool_calls"' not in raw:
        return raw
    try:
        answer = msgspec.json.decode(raw)
        for choice in answer["choices"]:
            message = choice.get("delta") or choice.get("message") or {}
            for position, call in enumerate(message.pop("tool_calls", None) or ()):
                if call.get("index", position) == 0:
                    message["function_call"] = call["function"]
            if choice.get("finish_reason") == "tool_calls":
                choice["finish_reason"] = "function_call"
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
        return raw
    return msgspec.json.encode(answer)
