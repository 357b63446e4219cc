"""What a model's Modelfile adds to a request that goes to llama-server: MESSAGEs, SYSTEM, PARAMETERs. Pure.

An Ollama adds them by itself; it does so on every one of its routes, so they count in every dialect here too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import msgspec

from sollold.models.model import Model

_SYSTEM = ("system", "developer")
SAME_NAMES = (
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
"""Ollama's options that llama-server calls by the same name."""
_LIMITS = ("max_tokens", "max_completion_tokens", "n_predict")


def own_parameters(model: Model) -> Mapping[str, Any]:
    """The PARAMETERs, not to be changed; none for what is no JSON object."""
    return _read_parameters(model.params)


@lru_cache(maxsize=1024)
def _read_parameters(params: str) -> Mapping[str, Any]:
    try:
        found = msgspec.json.decode(params)
    except msgspec.DecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def with_parameters(model: Model, more: Mapping[str, Any]) -> str:
    """Its ``params`` with further PARAMETERs, or others in place of its own."""
    return msgspec.json.encode({**own_parameters(model), **more}).decode()


def own_messages(model: Model) -> list[dict[str, Any]]:
    """The MESSAGEs, as OpenAI has them."""
    return [{"role": role, "content": content} for role, content in model.messages]


def bare(model: Model) -> Model:
    """``model`` without what an Ollama adds by itself."""
    return replace(model, messages=(), params="", system="")


def own_context(model: Model) -> int:
    """The context that the Modelfile names; 0: none."""
    value = own_parameters(model).get("num_ctx")
    return value if isinstance(value, int) and value > 0 else 0


def with_modelfile(messages: list[dict[str, Any]], model: Model) -> list[dict[str, Any]]:
    """``messages`` behind the model's own MESSAGEs, and behind its SYSTEM unless they have one."""
    asked = any(message.get("role") in _SYSTEM for message in messages)
    system = [{"role": "system", "content": model.system}] if model.system and not asked else []
    return [*system, *own_messages(model), *messages]


def add_parameters(body: dict[str, Any], model: Model) -> dict[str, Any]:
    """Put the PARAMETERs that the caller did not name into a body for llama-server."""
    own = own_parameters(model)
    if not own:
        return body
    for name in SAME_NAMES:
        value = own.get(name)
        if isinstance(value, int | float) and body.get(name) is None:
            body[name] = value
    seed, last, limit, stop = (own.get(name) for name in ("seed", "repeat_last_n", "num_predict", "stop"))
    if isinstance(seed, int) and seed >= 0 and body.get("seed") is None:
        body["seed"] = seed & 0xFFFFFFFF
    if isinstance(last, int) and body.get("repeat_last_n") is None:
        body["repeat_last_n"] = last if last >= 0 else 2**31 - 1
    if isinstance(limit, int) and limit > 0 and all(body.get(name) is None for name in _LIMITS):
        body["max_tokens"] = limit
    if stop and not body.get("stop"):
        body["stop"] = [stop] if isinstance(stop, str) else [word for word in stop if isinstance(word, str)]
    return body
