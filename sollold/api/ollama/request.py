"""Request bodies of Ollama's clients, and the conversion of their shared fields for llama-server."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import msgspec
from aiohttp import web

from sollold.api.engine.fields import CallerFields, require_model, stop_list
from sollold.api.engine.modelfile import own_parameters, sampling_fields
from sollold.api.engine.number_ranges import (
    Factor,
    Mirostat,
    Penalty,
    RepeatPenalty,
    Share,
    Small,
    Temperature,
    TopLogprobs,
    Whole,
)
from sollold.api.engine.placement import PlacedFields
from sollold.api.http.body import as_type, read_object
from sollold.api.http.invalid import explain, wrong_field
from sollold.api.http.json_text import decode_text
from sollold.cluster.gossip.record import Backend
from sollold.errors import bad_request
from sollold.models.model import Model
from sollold.serving.request import Delivered, Engine
from sollold.undecodable import UNDECODABLE

T = TypeVar("T", bound=msgspec.Struct)


class Options(msgspec.Struct, omit_defaults=True):
    """``options``, by Ollama's names. Omitted options keep the model's or the engine's default.

    ``num_keep``: number of tokens kept at the beginning of a plain prompt (raw, template) that is too long.
    """

    num_ctx: Small | None = None
    num_predict: Whole | None = None
    num_keep: Small | None = None
    seed: Whole | None = None
    temperature: Temperature | None = None
    top_k: Small | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    typical_p: Share | None = None
    repeat_last_n: Whole | None = None
    repeat_penalty: RepeatPenalty | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    mirostat: Mirostat | None = None
    mirostat_tau: Factor | None = None
    mirostat_eta: Factor | None = None
    stop: list[str] | str | None = None


class Message(msgspec.Struct, omit_defaults=True):
    """One turn of a conversation."""

    role: str = "user"
    content: str | None = None
    thinking: str | None = None
    images: list[Any] | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None
    name: str | None = None


class Resume(msgspec.Struct, kw_only=True):
    """``resume``: the part of this answer that a node which has failed delivered; only the rest is generated.

    ``events``: number of records with text; ``tool_calls``: number of tool calls; ``spent_ms``: milliseconds
    since the first record; ``backend``: as in ``_routing``.
    """

    content: str = ""
    thinking: str = ""
    events: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] = 0
    tool_calls: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] = 0
    logprobs: bool = False
    spent_ms: Annotated[float, msgspec.Meta(ge=0, le=1e12)] = 0.0
    backend: str = ""

    def delivered(self) -> Delivered:
        """Return it in the form that the service takes."""
        engine = None
        if self.backend:
            engine = Engine.OLLAMA if self.backend == Backend.OLLAMA else Engine.LLAMA
        return Delivered(
            content=self.content,
            thinking=self.thinking,
            events=self.events,
            tool_calls=self.tool_calls > 0,
            logprobs=self.logprobs,
            spent_ms=self.spent_ms,
            engine=engine,
        )


class Shared(PlacedFields, kw_only=True):
    """The fields that chat and generate have in common.

    ``truncate``: false refuses a prompt that is too long, otherwise its oldest part is dropped; ``shift`` is
    accepted and ignored: an answer that fills the context ends with ``length``.
    """

    stream: bool | None = None
    format: Any = None
    options: dict[str, Any] | None = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    truncate: bool | None = None
    shift: bool | None = None
    resume: Resume | None = None

    def delivered(self) -> Delivered | None:
        """Return the part of the answer that the caller already has; None for a new request.

        Raises:
            Refusal: BAD_REQUEST for a request that is not streamed.
        """
        if self.resume is not None and self.stream is False:
            raise bad_request("resume requires a streamed request; repeat the whole request")
        return self.resume.delivered() if self.resume is not None else None


class Chat(Shared, kw_only=True):
    """``POST /api/chat``."""

    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None


class Generate(Shared, kw_only=True):
    """``POST /api/generate``."""

    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    context: list[int] | None = None
    raw: bool | None = None
    images: list[Any] | None = None


class Embed(CallerFields, kw_only=True):
    """``POST /api/embed``."""

    model: str = ""
    input: str | list[str] | None = None
    truncate: bool | None = None
    dimensions: Small | None = None
    options: dict[str, Any] | None = None


class Embeddings(CallerFields, kw_only=True):
    """``POST /api/embeddings``, the deprecated endpoint."""

    model: str = ""
    prompt: str | None = None
    options: dict[str, Any] | None = None


class Named(msgspec.Struct, kw_only=True):
    """A body that names a model: show, pull, delete. Old clients use ``name``."""

    model: str = ""
    name: str = ""
    stream: bool | None = None
    verbose: bool | None = None
    insecure: bool | None = None
    system: str | None = None
    options: dict[str, Any] | None = None

    @property
    def wanted(self) -> str:
        """The name, from ``model`` or ``name``.

        Raises:
            Refusal: BAD_REQUEST when there is none.
        """
        return require_model(self.model or self.name)


class Delete(Named, kw_only=True):
    """``DELETE /api/delete``. ``nodes``: names or ids of nodes to delete it from; none for all."""

    nodes: list[str] | None = None


class Relayable(msgspec.Struct, kw_only=True):
    """``POST /api/push`` and ``/api/create``: the fields that determine which Ollama receives it."""

    model: str = ""
    name: str = ""
    from_: Any = msgspec.field(name="from", default="")

    def needed(self, path: str) -> str:
        """Return the model that the Ollama must have; empty for none."""
        if path == "/api/push":
            return self.model or self.name
        return self.from_ if isinstance(self.from_, str) else ""


class Copy(msgspec.Struct, kw_only=True):
    """``POST /api/copy``. ``nodes``: names or ids of nodes to copy it at; none for all that have it."""

    source: str = ""
    destination: str = ""
    nodes: list[str] | None = None


async def read_as(request: web.Request, type_: type[T]) -> tuple[dict[str, Any], T]:
    """Return the request's body with its keys spelt as in ``type_``, and the body parsed as ``type_``.

    Raises:
        Refusal: as `read_object` and `as_type`.
    """
    body = fold_keys(await read_object(request), type_)
    messages = body.get("messages")
    if isinstance(messages, list):
        body["messages"] = [fold_keys(m, Message) if isinstance(m, dict) else m for m in messages]
    return body, as_type(body, type_)


def fold_keys(body: dict[str, Any], type_: type[msgspec.Struct]) -> dict[str, Any]:
    """Return ``body`` with its keys spelt like the fields of ``type_``: Go ignores their case.

    Fields that are null are dropped: Go takes them as omitted.
    """
    names = _names_by_lower(type_)
    return {names.get(key.lower(), key): value for key, value in body.items() if value is not None}


@functools.cache
def _names_by_lower(type_: type[msgspec.Struct]) -> dict[str, str]:
    return {name.lower(): name for name in type_.__struct_encode_fields__}


_INTEGERS = ("num_ctx", "num_predict", "num_keep", "seed", "top_k", "repeat_last_n", "mirostat")
"""Integer options; Ollama truncates a fraction."""


def parse_options(options: dict[str, Any] | None, model: Model | None) -> Options:
    """Return the caller's options merged over the model's own (its ``params``).

    Options that Ollama no longer supports, or that place layers (``num_gpu`` …), which the cluster decides,
    are left out.

    Raises:
        Refusal: BAD_REQUEST naming the option that has a wrong type or is out of range.
    """
    merged = _valid_options(own_parameters(model)) if model is not None else {}
    merged |= {key: value for key, value in (options or {}).items() if value is not None}
    try:
        return _options(merged)
    except msgspec.ValidationError as error:
        raise bad_request(f"options: {explain(error, Options)}", field=wrong_field(error)) from None


def _options(options: Mapping[str, Any]) -> Options:
    values = {key: value for key, value in options.items() if value is not None}
    for name in _INTEGERS:
        if isinstance(values.get(name), float) and math.isfinite(values[name]):
            values[name] = int(values[name])
    # Not strict: clients send 40.0 for an int, which Ollama accepts, and "0.7" for a float.
    return msgspec.convert(values, type=Options, strict=False)


def _valid_options(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the valid options of a Modelfile: a caller is not to blame for the others."""
    valid: dict[str, Any] = {}
    for name, value in parameters.items():
        with contextlib.suppress(msgspec.ValidationError):
            _options({name: value})
            valid[name] = value
    return valid


def sampling(options: Options) -> dict[str, Any]:
    """Return llama-server's fields for those of Ollama's options that are set."""
    body = sampling_fields(msgspec.to_builtins(options))
    if options.num_predict is not None:
        # In Ollama 0 and less mean no limit; llama-server accepts only -1 for that.
        body["n_predict"] = options.num_predict if options.num_predict > 0 else -1
    if options.num_keep is not None:
        body["n_keep"] = max(options.num_keep, -1)
    if stop := stop_list(options.stop):
        body["stop"] = stop
    return body


def response_format(format_: Any) -> dict[str, Any] | None:
    """Return ``response_format`` for ``format``: ``"json"`` or a JSON schema; ``None`` for free text.

    Raises:
        Refusal: BAD_REQUEST.
    """
    value = format_of(format_)
    if value is None:
        return None
    if isinstance(value, str):
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": value}}


def format_of(format_: Any) -> str | dict[str, Any] | None:
    """Return ``format`` as ``"json"``, a JSON schema, or None for free text.

    Raises:
        Refusal: BAD_REQUEST.
    """
    if format_ is None or format_ == "":
        return None
    if format_ == "json":
        return "json"
    if isinstance(format_, str):
        # Some clients send the schema as a string.
        try:
            format_ = decode_text(format_)
        except UNDECODABLE:
            format_ = None
    if isinstance(format_, dict):
        return format_
    raise bad_request('format must be "json" or a JSON schema (an object)')


LEVELS = ("low", "medium", "high", "max")


def think_of(think: bool | str | None) -> bool | str | None:
    """Return ``think`` as true, false or a level; None if it is missing or an empty string.

    Raises:
        Refusal: BAD_REQUEST if it is none of these.
    """
    if not isinstance(think, str):
        return think
    word = think.strip().lower()
    if not word:
        return None
    if word in ("true", "false", "none"):
        return word == "true"
    if word not in LEVELS:
        raise bad_request(f"unknown think {think[:40]!r}; it must be true, false, {', '.join(LEVELS)}")
    return word


def thinking(think: bool | str | None, model: Model) -> dict[str, Any]:
    """Return llama-server's fields for ``think``.

    Raises:
        Refusal: BAD_REQUEST if the model does not support thinking, or the level is unknown.
    """
    think = think_of(think)
    if think is None:
        return {}
    if think is False:
        return {"reasoning_effort": "none"}
    if "thinking" not in model.capabilities:
        raise bad_request(f'"{model.name}" does not support thinking')
    fields: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": True}}
    if isinstance(think, str):
        fields["reasoning_effort"] = "high" if think == "max" else think
    return fields
