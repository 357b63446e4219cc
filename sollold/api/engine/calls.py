"""Builds the call for each engine from a parsed request, and the `Ask` that carries them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import msgspec
from msgspec.structs import replace

from sollold.api.engine.fields import parse_keep_alive, require_model
from sollold.api.engine.modelfile import own_context, own_parameters, sampling_fields
from sollold.api.engine.ollama_tools import readable_tools
from sollold.api.engine.placement import PlacementBody
from sollold.api.engine.prepare import Prepared, prepare_chat
from sollold.api.engine.protect import protected
from sollold.api.http.caller import Caller
from sollold.errors import bad_request
from sollold.leader.wish import NO_WISH
from sollold.models.listing import Listed
from sollold.models.model import Model
from sollold.serving.request import Ask, Call, Engine

CHAT_PATH = "/v1/chat/completions"
"""Path of chats at either engine."""
OWN_FIELDS = frozenset(("priority", "timeout", "keep_alive", "placement", "num_ctx", "id_slot"))
"""Fields that are not passed to engines; ``id_slot`` would let a caller take another's slot."""


def engine_body(body: dict[str, Any]) -> dict[str, Any]:
    """Return ``body`` without our own fields and without nulls, which mean "not given"."""
    return {key: value for key, value in body.items() if value is not None and key not in OWN_FIELDS}


_EFFORTS = {"minimal": "low", "xhigh": "high", "ultra": "high"}
"""Efforts of OpenAI and its clients that an older Ollama rejects → the nearest that it accepts."""


def ollama_body(body: dict[str, Any], model: Model | None = None) -> dict[str, Any]:
    """`engine_body` for an Ollama's ``/v1``.

    Ollama names the fields ``reasoning`` and ``max_tokens``, its templates have no developer role, it ignores
    a ``tool_choice``, and can't read every tool schema. It takes each part of a content for a message, and
    replaces some of the model's own parameters by OpenAI's defaults. It rejects unknown efforts, and any
    effort for a ``model`` that can't think, although clients made for OpenAI's models (Codex) always send it.
    """
    out = engine_body(body)
    limit = out.pop("max_completion_tokens", None)
    if limit is not None:
        out.setdefault("max_tokens", limit)
    effort = out.get("reasoning_effort")
    if effort == "" or (model is not None and "thinking" not in model.capabilities):
        out.pop("reasoning_effort", None)
    elif isinstance(effort, str) and effort in _EFFORTS:
        out["reasoning_effort"] = _EFFORTS[effort]
    if model is not None and (own := own_parameters(model)):
        for name, value in sampling_fields({name: own.get(name) for name in _REPLACED}).items():
            out.setdefault(name, value)
    messages = out.get("messages")
    if isinstance(messages, list):
        out["messages"] = [_ollama_message(message) for message in messages]
    if out.get("tool_choice") == "none":
        # Ollama ignores it, and the model could call the tools.
        out.pop("tools", None)
    if out.get("tools"):
        out["tools"] = readable_tools(out["tools"])
    return out


_REPLACED = ("temperature", "top_p", "presence_penalty", "frequency_penalty")
"""Parameters that an Ollama's ``/v1`` sets itself if a request does not."""


def _ollama_message(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    parts = message.get("content")
    if isinstance(parts, list) and all(part.get("type") == "text" for part in parts):
        # Ollama would drop the id of the call from the result of a tool, too.
        message = {**message, "content": "\n".join(part["text"] for part in parts)}
    if message.get("role") == "developer":
        message = {**message, "role": "system"}
    if "reasoning_content" not in message:
        return message
    rest = {key: value for key, value in message.items() if key != "reasoning_content"}
    return {"reasoning": message["reasoning_content"], **rest}


def typed_body(body: dict[str, Any], parsed: msgspec.Struct) -> dict[str, Any]:
    """Return ``body`` with its numbers as decoded in ``parsed``: ``"5"`` and ``5.0`` become 5."""
    out, fields = dict(body), _fields(type(parsed))
    for name in body:
        if name in fields and isinstance(value := getattr(parsed, name), (int, float)):
            out[name] = value
    return out


@lru_cache(maxsize=256)
def _fields(struct: type[msgspec.Struct]) -> frozenset[str]:
    return frozenset(struct.__struct_fields__)


def calls_for(
    model: Model, *, llama: Callable[[], Call], ollama: Call | None, operation: str
) -> dict[Engine, Call]:
    """Return the calls to the engines that can answer for ``model``.

    ``llama`` is called only for a model that llama.cpp can load, since it may refuse what an Ollama accepts.
    ``operation`` names the request in the error.

    Raises:
        Refusal: BAD_REQUEST if no engine is left, and the exceptions of ``llama``.
    """
    calls: dict[Engine, Call] = {}
    if ollama is not None:
        calls[Engine.OLLAMA] = ollama
    if not model.only_ollama:
        calls[Engine.LLAMA] = llama()
    if not calls:
        raise bad_request(f"{operation} needs llama.cpp. {model.only_ollama}")
    return calls


def chat_calls(
    model: Model, *, llama: Callable[[], dict[str, Any]], ollama: Call
) -> tuple[dict[Engine, Call], Prepared]:
    """Return the calls of a chat, and the results of preparing it for llama-server.

    ``llama`` makes the body for llama-server; as in `calls_for`, only for a model that llama.cpp can load.

    Raises:
        Refusal: BAD_REQUEST, as `prepare_chat`, and the exceptions of ``llama``.
    """
    calls = {Engine.OLLAMA: ollama}
    if model.only_ollama:
        return calls, Prepared()
    body = llama()
    prepared = prepare_chat(body)
    return {**calls, Engine.LLAMA: Call(CHAT_PATH, body)}, prepared


def _with_plain_keep_alive(calls: dict[Engine, Call]) -> dict[Engine, Call]:
    """Convert ``keep_alive`` to a form that an Ollama accepts: not a quoted number or an empty string."""
    call = calls.get(Engine.OLLAMA)
    value = call.body.get("keep_alive") if call is not None else None
    if call is None or not isinstance(value, str):
        return calls
    body = {key: field for key, field in call.body.items() if key != "keep_alive"}
    if value:
        try:
            body["keep_alive"] = float(value)
        except ValueError:
            body["keep_alive"] = value  # a duration, as Go writes it
    return {**calls, Engine.OLLAMA: replace(call, body=body)}


def build_ask(
    caller: Caller,
    name: str,
    listed: Listed,
    calls: dict[Engine, Call],
    *,
    stream: bool = False,
    keep_alive: float | str | None = None,
    context: int | None = None,
    embedding: bool = False,
    load_only: bool = False,
    prefix: str = "",
    placement: PlacementBody | None = None,
) -> Ask:
    """Build the request for the service. ``name``, ``keep_alive``, ``context``: as sent by the caller.

    Raises:
        Refusal: BAD_REQUEST for an invalid model name or ``keep_alive``, or for input that could harm an
            engine.
    """
    return Ask(
        id=caller.id,
        model=require_model(name),
        calls=protected(_with_plain_keep_alive(calls), caller.media),
        stream=stream,
        load_only=load_only,
        context=max(0, context or own_context(listed.model)),
        keep_alive=parse_keep_alive(keep_alive),
        priority=caller.priority,
        client=caller.client,
        embedding=embedding,
        deadline=caller.deadline,
        prefix=prefix,
        explain=caller.explain,
        media=caller.media,
        resolved=listed,
        placement=placement.wish() if placement is not None else NO_WISH,
    )
