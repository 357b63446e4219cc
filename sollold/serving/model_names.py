"""Translates model names for Ollama: each Ollama is asked by its own name for the model, which may differ
from the caller's (an alias, a name without tag or host, the same content under another name).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import msgspec

from sollold.serving.candidate import EndpointCandidate
from sollold.serving.request import Call, Engine


def body_for(candidate: EndpointCandidate, call: Call) -> dict[str, Any]:
    """Return the call's body with the engine's own name for the model."""
    if candidate.engine is not Engine.OLLAMA:
        return call.body
    return {**call.body, "model": candidate.endpoint.model}


def callers_name(candidate: EndpointCandidate, call: Call) -> Callable[[bytes], bytes] | None:
    """Return a function that replaces the model's name in an event by the one that the caller requested.

    None if there is nothing to replace, so that it costs nothing per token.
    """
    requested = call.body.get("model")
    if candidate.engine is not Engine.OLLAMA or not isinstance(requested, str) or not requested:
        return None
    engine_name = candidate.endpoint.model
    if requested == engine_name:
        return None
    # In every event the field precedes the model's text; inside a string its quotes would be escaped.
    field = re.compile(rb'("model"\s*:\s*)' + re.escape(msgspec.json.encode(engine_name)))
    replacement = msgspec.json.encode(requested)
    return lambda event: field.sub(lambda match: match[1] + replacement, event, count=1)
