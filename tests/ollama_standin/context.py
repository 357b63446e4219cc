"""The context of a runner: `num_ctx` is exact, and longer conversations are truncated or refused."""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web

from tests.ollama_standin.refusals import engine_error

USUAL = 4096


def requested_context(params: dict[str, Any], body: dict[str, Any]) -> int:
    """Return the context of a request in tokens: its own option or the model's PARAMETER."""
    return int((body.get("options") or {}).get("num_ctx") or params.get("num_ctx") or USUAL)


_WHOLE = ("num_ctx", "num_predict", "num_keep", "seed", "top_k", "repeat_last_n", "mirostat")
_FRACTIONS = ("temperature", "top_p", "min_p", "typical_p", "repeat_penalty")


def option_error(options: dict[str, Any]) -> str:
    """Return Ollama's error message for an option of a wrong type, or an empty string."""
    for name, value in options.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and name in (*_WHOLE, *_FRACTIONS) and not number:
            return f'option "{name}" must be of type {"integer" if name in _WHOLE else "float32"}'
        if name == "stop" and not isinstance(value, list):
            return 'option "stop" must be of type array'
    return ""


def fitted(body: dict[str, Any], context: int) -> dict[str, Any]:
    """Return ``body`` truncated to ``context`` by its oldest messages or the beginning of the prompt.

    Words count as tokens.

    Raises:
        HTTPBadRequest: the body is too long and ``truncate`` is false.
    """
    if _words(body) <= context:
        return body
    if body.get("truncate") is False:
        error_text = (
            f"request ({_words(body)} tokens) exceeds the available context size ({context} tokens), "
            "try increasing it"
        )
        counts = {"n_prompt_tokens": _words(body), "n_ctx": context}
        error = json.dumps({"error": engine_error(error_text, "exceed_context_size_error", **counts)})
        raise web.HTTPBadRequest(text=error, content_type="application/json")
    if "messages" not in body:
        words = str(body.get("prompt") or "").split()
        return {**body, "prompt": " ".join(words[len(words) - context :])}
    messages = list(body["messages"])
    while len(messages) > 1 and _words({"messages": messages}) > context:
        # The system message and the last message are kept.
        oldest = next(
            (index for index, candidate in enumerate(messages[:-1]) if candidate.get("role") != "system"),
            None,
        )
        if oldest is None:
            break
        del messages[oldest]
    return {**body, "messages": messages}


def _words(body: dict[str, Any]) -> int:
    texts = [str(body.get("system") or ""), str(body.get("prompt") or "")]
    for message in [*(body.get("before") or ()), *(body.get("messages") or ())]:
        content = message.get("content")
        texts.append(content if isinstance(content, str) else "")
    return sum(len(text.split()) for text in texts)
