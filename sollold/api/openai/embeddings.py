"""``/v1/embeddings``: the request, and the response in the requested encoding. Pure."""

from __future__ import annotations

import base64
import struct
from typing import Any

import msgspec

from sollold.api.engine.calls import engine_body
from sollold.api.engine.embeddings import check_count, shortened
from sollold.api.engine.ignored_fields import OF_THE_CALLER, context_note, ignored_fields, without_effect
from sollold.api.engine.number_ranges import Dimensions
from sollold.api.engine.placement import V1Fields
from sollold.api.openai.request import check_tokens
from sollold.errors import Fault, Refusal, bad_request
from sollold.undecodable import UNDECODABLE


class EmbeddingAsk(V1Fields, kw_only=True):
    """``POST /v1/embeddings``."""

    input: str | list[Any] | None = None
    encoding_format: str | None = None
    dimensions: Dimensions | None = None


_FIELDS = frozenset({*EmbeddingAsk.__struct_fields__, *OF_THE_CALLER, "embd_normalize"})


def embedding_warnings(body: dict[str, Any]) -> tuple[str, ...]:
    """Return a warning for each field of the original request that has no effect here."""
    return ignored_fields(body, _FIELDS)


def native_embedding_notes(body: dict[str, Any], ask: EmbeddingAsk) -> tuple[str, ...]:
    """Return a warning for each field that has no effect when an Ollama answers."""
    ignored = ["embd_normalize"] if body.get("embd_normalize", 2) != 2 else []
    return (*embedding_warnings(body), *without_effect(ignored), *context_note(ask.num_ctx))


def embedding_body(body: dict[str, Any], ask: EmbeddingAsk) -> dict[str, Any]:
    """Return the body for llama-server's ``/v1/embeddings``.

    Raises:
        Refusal: BAD_REQUEST.
    """
    if not ask.input:
        raise bad_request("input is required: a string or a list of strings", field="input")
    check_tokens(ask.input, "input")
    texts = [ask.input] if isinstance(ask.input, str) else ask.input
    if not isinstance(texts[0], int):
        check_count(texts)
    if {str, int} <= set(map(type, texts)):
        # llama-server would join them into one text with a single vector.
        raise bad_request("input must not mix strings and tokens", field="input")
    if any(text == "" for text in texts):
        raise bad_request("an input is empty; an empty string has no embedding", field="input")
    if ask.encoding_format not in (None, "", "float", "base64"):
        raise bad_request("encoding_format must be float or base64", field="encoding_format")
    out = engine_body(body)
    if out.get("encoding_format") == "":
        del out["encoding_format"]
    if out.pop("dimensions", None) is not None:
        out["encoding_format"] = "float"
    return out


class _Vector(msgspec.Struct):
    embedding: msgspec.Raw


class _Vectors(msgspec.Struct):
    data: list[_Vector]


_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_entries = msgspec.json.Decoder(list[dict[str, msgspec.Raw]])
_vector = msgspec.json.Decoder(list[float])


def convert_embeddings(raw: bytes, ask: EmbeddingAsk) -> bytes:
    """Return a response of ``/v1/embeddings`` cut to ``dimensions``, and encoded as base64 if requested.

    llama-server doesn't support ``dimensions``, an older Ollama no base64, which clients decode unchecked.

    Raises:
        Refusal: ENGINE, if the response can't be parsed.
    """
    try:
        if ask.dimensions is None:
            vectors = msgspec.json.decode(raw, type=_Vectors).data
            if all(bytes(vector.embedding).startswith(b'"') for vector in vectors):
                return raw
        answer: dict[str, Any] = _fields.decode(raw)
        entries: list[dict[str, Any]] = _entries.decode(answer["data"])
        for entry in entries:
            # One by one: decoding and encoding all at once would keep other threads, and the loop, waiting.
            vector = shortened(_vector.decode(entry["embedding"]), ask.dimensions)
            value: object = vector
            if ask.encoding_format == "base64":
                value = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
            entry["embedding"] = msgspec.Raw(msgspec.json.encode(value))
    except (*UNDECODABLE, KeyError, TypeError, OverflowError):
        raise Refusal(Fault.ENGINE, "the engine's embeddings can't be parsed") from None
    return msgspec.json.encode({**answer, "data": entries})
