"""The model's name in an Ollama's answers: each Ollama is asked by its own name for it, which is not always
the one that the caller wrote (an alias, a name without tag or host, the same content under another name).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import msgspec

from sollold.serving.candidate import EndpointCandidate
from sollold.serving.request import Call, Engine


def body_for(candidate: EndpointCandidate, call: Call) -> dict[str, Any]:
    """The call's body with the model named as the engine itself knows it."""
    if candidate.engine is not Engine.OLLAMA:
        return call.body
    return {**call.body, "model": candidate.endpoint.model}


def callers_name(candidate: EndpointCandidate, call: Call) -> Callable[[bytes], bytes] | None:
    """What turns an event of the engine into one that names the model as the caller did.

    None where nothing is to be done, so that a token costs nothing then.
    """
    wrote = call.body.get("model")
    if candidate.engine is not Engine.OLLAMA or not isinstance(wrote, str) or not wrote:
        return None
    named = candidate.endpoint.model
    if wrote == named:
        return None
    # In every answer the field comes before what the model wrote; in a text its quotes would be escaped.
    field = re.compile(rb'("model"\s*:\s*)' + re.escape(msgspec.json.encode(named)))
    shown = msgspec.json.encode(wrote)
    return lambda event: field.sub(lambda match: match[1] + shown, event, count=1)
