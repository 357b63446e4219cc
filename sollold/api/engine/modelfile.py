"""Adds a Modelfile's MESSAGEs, SYSTEM and PARAMETERs to requests that go to llama-server. Pure.

An Ollama adds them itself, except some PARAMETERs on its ``/v1``, so here they apply in every dialect too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import msgspec

from sollold.models.model import Model
from sollold.undecodable import UNDECODABLE

_SYSTEM = ("system", "developer")
_SAME_NAMES = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repeat_penalty",
    "presence_penalty",
    "frequency_penalty",
    "mirostat",
    "mirostat_tau",
    "mirostat_eta",
)
"""Ollama's options that have the same name in llama-server."""
_LIMITS = ("max_tokens", "max_completion_tokens", "n_predict")


def own_parameters(model: Model) -> Mapping[str, Any]:
    """Return the PARAMETERs, read-only; empty if they are not a JSON object."""
    return _read_parameters(model.params)


@lru_cache(maxsize=1024)
def _read_parameters(params: str) -> Mapping[str, Any]:
    try:
        parameters = msgspec.json.decode(params)
    except UNDECODABLE:
        return {}
    return parameters if isinstance(parameters, dict) else {}


def with_parameters(model: Model, parameters: Mapping[str, Any]) -> str:
    """Return the model's ``params`` with further PARAMETERs, which override its own."""
    return msgspec.json.encode({**own_parameters(model), **parameters}).decode()


def own_messages(model: Model) -> list[dict[str, Any]]:
    """Return the MESSAGEs in OpenAI's form."""
    return [{"role": role, "content": content} for role, content in model.messages]


def without_modelfile(model: Model) -> Model:
    """Return ``model`` without its MESSAGEs, PARAMETERs and SYSTEM."""
    return replace(model, messages=(), params="", system="")


def own_context(model: Model) -> int:
    """Return the context length set by the Modelfile; 0 if there is none."""
    value = own_parameters(model).get("num_ctx")
    return value if isinstance(value, int) and value > 0 else 0


def with_modelfile(messages: list[dict[str, Any]], model: Model) -> list[dict[str, Any]]:
    """Return ``messages`` after the model's SYSTEM, unless they have their own, and its MESSAGEs."""
    system = []
    if model.system and not any(message.get("role") in _SYSTEM for message in messages):
        system = [{"role": "system", "content": model.system}]
    return [*system, *own_messages(model), *messages]


def sampling_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return llama-server's fields for Ollama's options that control sampling, without invalid ones."""
    fields = {name: value for name in _SAME_NAMES if isinstance(value := options.get(name), int | float)}
    seed, last = options.get("seed"), options.get("repeat_last_n")
    if isinstance(seed, int) and seed >= 0:
        fields["seed"] = seed & 0xFFFFFFFF
    if isinstance(last, int):
        # In Ollama -1 is the whole context; llama-server takes a large number for it.
        fields["repeat_last_n"] = last if last >= 0 else 2**31 - 1
    return fields


def add_parameters(body: dict[str, Any], model: Model) -> dict[str, Any]:
    """Add the PARAMETERs that the caller did not set to a body for llama-server, in place."""
    own = own_parameters(model)
    if not own:
        return body
    for name, value in sampling_fields(own).items():
        if body.get(name) is None:
            body[name] = value
    limit, stop = own.get("num_predict"), own.get("stop")
    if isinstance(limit, int) and limit > 0 and all(body.get(name) is None for name in _LIMITS):
        body["max_tokens"] = limit
    listed = stop if isinstance(stop, list) else [stop]
    if (words := [word for word in listed if word and isinstance(word, str)]) and not body.get("stop"):
        body["stop"] = words
    return body
