"""What Ollama's clients send, as types, and its shared fields in llama-server's words."""

from __future__ import annotations

import base64
import binascii
from typing import Any

import msgspec

from sollold.models.model import Model
from sollold.serving.ask import Fault, Refusal
from sollold.units import parse_seconds


class Options(msgspec.Struct, omit_defaults=True):
    """``options``: Ollama's names. What is not named stays the model's or the engine's default.

    ``num_keep``: tokens at the beginning of a plain prompt (raw, template) that stay when it is too long.
    """

    num_ctx: int | None = None
    num_predict: int | None = None
    num_keep: int | None = None
    seed: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repeat_last_n: int | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    mirostat: int | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    stop: list[str] | str | None = None


class Message(msgspec.Struct, omit_defaults=True):
    """One turn of a conversation."""

    role: str
    content: str | None = None
    thinking: str | None = None
    images: list[str] | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None
    name: str | None = None


class Shared(msgspec.Struct, kw_only=True):
    """The fields that chat and generate have in common.

    ``truncate``: false refuses a prompt that is too long, else its oldest part goes; ``shift`` is taken and
    means nothing: an answer that fills the context ends with ``length``.
    """

    model: str = ""
    stream: bool | None = None
    format: Any = None
    keep_alive: float | str | None = None
    options: dict[str, Any] | None = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    truncate: bool | None = None
    shift: bool | None = None
    priority: int | str | None = None
    timeout: float | str | None = None


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
    images: list[str] | None = None


class Embed(msgspec.Struct, kw_only=True):
    """``POST /api/embed``."""

    model: str = ""
    input: str | list[str] | None = None
    truncate: bool | None = None
    dimensions: int | None = None
    keep_alive: float | str | None = None
    options: dict[str, Any] | None = None
    priority: int | str | None = None
    timeout: float | str | None = None


class Embeddings(msgspec.Struct, kw_only=True):
    """``POST /api/embeddings``, the old one."""

    model: str = ""
    prompt: str | None = None
    keep_alive: float | str | None = None
    options: dict[str, Any] | None = None
    priority: int | str | None = None
    timeout: float | str | None = None


class Named(msgspec.Struct, kw_only=True):
    """A body that names a model: show, pull, delete. Old clients say ``name``."""

    model: str = ""
    name: str = ""
    stream: bool | None = None
    verbose: bool | None = None
    insecure: bool | None = None

    @property
    def wanted(self) -> str:
        """The name, wherever it stands.

        Raises:
            Refusal: BAD_REQUEST when there is none.
        """
        return require_model(self.model or self.name)


class Delete(Named, kw_only=True):
    """``DELETE /api/delete``. ``nodes``: names or ids of where; none: everywhere."""

    nodes: list[str] | None = None


class Relayable(msgspec.Struct, kw_only=True):
    """``POST /api/push`` and ``/api/create``, as far as it matters which Ollama gets it."""

    model: str = ""
    name: str = ""
    from_: Any = msgspec.field(name="from", default="")

    def needed(self, path: str) -> str:
        """The model that the Ollama must have; empty: none."""
        if path == "/api/push":
            return self.model or self.name
        return self.from_ if isinstance(self.from_, str) else ""


class Copy(msgspec.Struct, kw_only=True):
    """``POST /api/copy``. ``nodes``: names or ids of those that are to do it; none: all that have it."""

    source: str = ""
    destination: str = ""
    nodes: list[str] | None = None


def require_model(name: str) -> str:
    """``name``, when it is one.

    Raises:
        Refusal: BAD_REQUEST.
    """
    if not name.strip():
        raise Refusal(Fault.BAD_REQUEST, "model is required")
    if len(name) > 500 or any(c < " " for c in name):
        raise Refusal(
            Fault.BAD_REQUEST, "the model's name is not right: it is too long or has control characters"
        )
    return name.strip()


def parse_keep_alive(value: float | str | None) -> float | None:
    """Seconds that a model stays after the last request; negative: for ever; ``None``: not named.

    A number is seconds, a string is Go's form of a duration or a number.

    Raises:
        Refusal: BAD_REQUEST.
    """
    if value is None or value == "":
        return None
    try:
        seconds = parse_seconds(value) if isinstance(value, str) else float(value)
    except ValueError as error:
        raise Refusal(Fault.BAD_REQUEST, f"keep_alive is not right: {error}") from None
    if seconds != seconds:
        raise Refusal(Fault.BAD_REQUEST, "keep_alive is not a number")
    return -1.0 if seconds < 0 else min(seconds, 10.0 * 365 * 86400)


def parse_options(given: dict[str, Any] | None, model: Model | None) -> Options:
    """The caller's options over the model's own (its ``params``).

    Options that Ollama no longer knows, or that place layers (``num_gpu`` …), are ours to decide: left out.

    Raises:
        Refusal: BAD_REQUEST naming the option of a wrong type.
    """
    merged: dict[str, Any] = {}
    if model is not None:
        try:
            own = msgspec.json.decode(model.params)
        except msgspec.DecodeError:
            own = {}
        if isinstance(own, dict):
            merged.update(own)
    named = {key: value for key, value in (given or {}).items() if value is not None}
    merged.update(named)
    try:
        # Not strict: clients send 40.0 for an int and "0.7" for a float, and Ollama takes the first.
        return msgspec.convert({k: v for k, v in merged.items() if v is not None}, type=Options, strict=False)
    except msgspec.ValidationError as error:
        raise Refusal(Fault.BAD_REQUEST, f"options: {error}") from None


def sampling(options: Options) -> dict[str, Any]:
    """llama-server's body fields for Ollama's options. Only what is named."""
    body: dict[str, Any] = {}
    for name in (
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
    ):
        value = getattr(options, name)
        if value is not None:
            body[name] = value
    if options.seed is not None and options.seed >= 0:
        body["seed"] = options.seed & 0xFFFFFFFF
    if options.repeat_last_n is not None:
        # Ollama: -1 is the whole context, which llama-server takes as a large number.
        body["repeat_last_n"] = options.repeat_last_n if options.repeat_last_n >= 0 else 2**31 - 1
    if options.num_predict is not None:
        # Ollama: negative is without end; llama-server knows only -1 for that.
        body["n_predict"] = max(options.num_predict, -1)
    if options.num_keep is not None:
        body["n_keep"] = max(options.num_keep, -1)
    if options.stop:
        body["stop"] = [options.stop] if isinstance(options.stop, str) else [s for s in options.stop if s]
    return body


def response_format(format_: Any) -> dict[str, Any] | None:
    """``format`` as ``response_format``: ``"json"`` or a JSON schema; ``None`` for free text.

    Raises:
        Refusal: BAD_REQUEST.
    """
    if format_ is None or format_ == "":
        return None
    if format_ == "json":
        return {"type": "json_object"}
    if isinstance(format_, str):
        # The schema as a string is what some clients send.
        try:
            format_ = msgspec.json.decode(format_)
        except msgspec.DecodeError:
            format_ = None
    if isinstance(format_, dict):
        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": format_}}
    raise Refusal(Fault.BAD_REQUEST, 'format must be "json" or a JSON schema (an object)')


LEVELS = ("low", "medium", "high", "max")


def thinking(think: bool | str | None, model: Model) -> dict[str, Any]:
    """llama-server's fields for ``think``.

    Raises:
        Refusal: BAD_REQUEST when thinking is asked of a model that can't, or a level is none.
    """
    if think is None:
        return {}
    if isinstance(think, str):
        word = think.strip().lower()
        if word in ("", "true", "false", "none"):
            think = word == "true"
        elif word not in LEVELS:
            raise Refusal(
                Fault.BAD_REQUEST,
                f"think {think[:40]!r} is not known; it is true, false, {', '.join(LEVELS)}",
            )
        else:
            think = word
    if think is False:
        return {"reasoning_effort": "none"}
    if "thinking" not in model.capabilities:
        raise Refusal(Fault.BAD_REQUEST, f'"{model.name}" does not support thinking')
    fields: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": True}}
    if isinstance(think, str):
        fields["reasoning_effort"] = "high" if think == "max" else think
    return fields


def image_part(image: str) -> dict[str, Any]:
    """A bare base64 image as an ``image_url`` part.

    Raises:
        Refusal: BAD_REQUEST when it is no base64.
    """
    text = image.split(",", 1)[1] if image.startswith("data:") and "," in image else image
    text = "".join(text.split())
    try:
        head = base64.b64decode(text[:64], validate=True) if len(text) >= 4 else b""
        base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Refusal(Fault.BAD_REQUEST, "an image is not base64") from None
    if not head:
        raise Refusal(Fault.BAD_REQUEST, "an image is empty")
    return {"type": "image_url", "image_url": {"url": f"data:image/{_image_kind(head)};base64,{text}"}}


def _image_kind(head: bytes) -> str:
    for magic, kind in ((b"\x89PNG", "png"), (b"GIF8", "gif"), (b"BM", "bmp")):
        if head.startswith(magic):
            return kind
    return "webp" if head[:4] == b"RIFF" and head[8:12] == b"WEBP" else "jpeg"


def need(model: Model, capability: str, what: str) -> None:
    """Refuse what ``model`` can't do.

    Raises:
        Refusal: BAD_REQUEST.
    """
    if capability not in model.capabilities:
        raise Refusal(Fault.BAD_REQUEST, f'"{model.name}" does not support {what}')


def no_reranker(model: Model) -> None:
    """Refuse to embed with a model whose vectors are scores.

    Raises:
        Refusal: BAD_REQUEST.
    """
    if "rerank" in model.capabilities:
        raise Refusal(
            Fault.BAD_REQUEST, f'"{model.name}" is a reranker and gives no embeddings; ask /v1/rerank'
        )
