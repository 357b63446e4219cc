"""Requests embeddings from either engine."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace

from sollold.api.engine.calls import calls_for
from sollold.api.engine.chunks import decoded
from sollold.api.engine.fields import refuse_reranker
from sollold.api.engine.truncate import TruncatingService
from sollold.api.http.inflight import InflightRequest
from sollold.api.http.response import ask_whole
from sollold.errors import Fault, Refusal, bad_request
from sollold.facts import dataclass
from sollold.models.model import Model
from sollold.serving.request import Ask, Call, Engine, Routing, Service, longest_input

T = TypeVar("T")

_MAX_PIECE = 256
"""Maximum texts in one request to an engine."""
_MAX_ON_LOOP = 8
_MAX_ON_LOOP_BYTES = 128 * 1024
_MAX_TEXTS = 4096


@dataclass(frozen=True, slots=True)
class Embedded:
    """Embeddings. ``native``: an Ollama's own response; else None, and ``vectors`` has the texts' order.

    The vectors of ``native`` are not decoded: they may be megabytes, and are usually passed on as they are.
    """

    vectors: list[list[float]]
    tokens: int
    routing: Routing
    native: dict[str, Any] | None = None

    def decoded(self) -> list[list[float]]:
        """Return the vectors of either engine.

        Raises:
            Refusal: ENGINE if Ollama's are unreadable.
        """
        if self.native is None:
            return self.vectors
        return [decoded(vector, _vector, _NATIVE) for vector in self.native.get("embeddings") or ()]


class Embedder:
    """Requests embeddings from the service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def embed(
        self,
        ask: Ask,
        model: Model,
        texts: Sequence[str],
        native: Call,
        live: InflightRequest,
        *,
        normalize: bool = True,
        truncate: bool = True,
    ) -> Embedded:
        """Embed ``texts``. ``ask``: the request without its calls. ``native``: the call to an Ollama.
        ``live``: records the progress of the caller's request.

        ``truncate``: cut texts that are too long to what the engine accepts.

        Raises:
            Refusal: as `Service.open`; BAD_REQUEST for a reranker.
        """
        refuse_reranker(model)
        check_count(texts)
        if len(texts) <= _MAX_PIECE:
            return await self._piece(ask, model, texts, native, live, normalize, truncate)
        # Piece by piece: parsing thousands of vectors at once would block the loop for too long.
        loop = asyncio.get_running_loop()
        started, results = loop.time(), []
        for begin in range(0, len(texts), _MAX_PIECE):
            piece = texts[begin : begin + _MAX_PIECE]
            remaining = max(0.001, ask.deadline - (loop.time() - started)) if ask.deadline > 0 else 0.0
            piece_ask = replace(ask, id=f"{ask.id}-{begin}", deadline=remaining)
            call = Call(native.path, {**native.body, "input": list(piece)})
            results.append(await self._piece(piece_ask, model, piece, call, live, normalize, truncate))
        return _joined(results)

    async def _piece(
        self,
        ask: Ask,
        model: Model,
        texts: Sequence[str],
        native: Call,
        live: InflightRequest,
        normalize: bool,
        truncate: bool,
    ) -> Embedded:
        llama = _call(model, texts, normalize=normalize)
        calls = calls_for(model, llama=lambda: llama, ollama=native, operation="embedding")
        service = TruncatingService(self._service) if truncate else self._service
        try:
            raw, routing = await ask_whole(service, replace(ask, calls=calls), live)
        except Refusal as refusal:
            if truncate or (limit := longest_input(refusal.message)) is None:
                raise
            # llama-server's message suggests a setting that callers don't have; clients know Ollama's.
            message = f"the input length exceeds the context length: context size ({limit} tokens)"
            raise Refusal(refusal.fault, message, status=refusal.status) from None
        if routing.engine is Engine.OLLAMA:
            answer = _read_native(raw)
            read = answer.get("prompt_eval_count")
            live.prompt_tokens += read if isinstance(read, int) else 0
            return Embedded([], 0, routing, answer)
        if len(raw) < _MAX_ON_LOOP_BYTES:
            vectors, tokens = _read(raw, normalize)
        else:
            vectors, tokens = await asyncio.to_thread(_read, raw, normalize)
        live.prompt_tokens += tokens
        if len(vectors) != len(texts):
            raise Refusal(Fault.ENGINE, f"the engine gave {len(vectors)} embeddings for {len(texts)} texts")
        return Embedded(vectors, tokens, routing)


def check_count(texts: Sequence[object]) -> None:
    """Refuse more texts than one request may embed.

    Raises:
        Refusal: BAD_REQUEST.
    """
    if len(texts) > _MAX_TEXTS:
        message = f"input has more than {_MAX_TEXTS} texts; send fewer at a time, or use /api/batch/embed"
        raise bad_request(message)


def _joined(results: Sequence[Embedded]) -> Embedded:
    """Join the pieces of a request."""
    vectors = [vector for result in results for vector in result.vectors]
    natives = [result.native for result in results]
    native = natives[0]
    for addition in natives[1:]:
        if native is None or addition is None:
            break
        for name, value in addition.items():
            if isinstance(value, int | list) and isinstance(native.get(name), type(value)):
                native[name] += value
    if len({native is None for native in natives}) > 1:
        raise Refusal(Fault.INTERRUPTED, "different engines returned the embeddings; send the request again")
    return Embedded(vectors, sum(result.tokens for result in results), results[-1].routing, native)


def _read(raw: bytes, normalize: bool) -> tuple[list[list[float]], int]:
    vectors, tokens = read_embeddings(raw)
    return [normalized(vector) for vector in vectors] if normalize else vectors, tokens


def _read_native(raw: bytes) -> dict[str, Any]:
    """Return an Ollama's response, with the JSON of its vectors.

    Raises:
        Refusal: ENGINE if it is unreadable.
    """
    return {
        name: value
        if name == "embedding"
        else decoded(value, _list if name == "embeddings" else _any, _NATIVE)
        for name, value in decoded(raw, _fields, _NATIVE).items()
    }


_NATIVE = "embeddings from Ollama"
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_list = msgspec.json.Decoder(list[msgspec.Raw] | None)
_any = msgspec.json.Decoder()
_vector = msgspec.json.Decoder(list[float])


async def as_json(vectors: Sequence[list[float]], dimensions: int | None) -> list[msgspec.Raw]:
    """Encode `shortened` vectors as JSON, in a thread if there are many."""

    def encoded() -> list[msgspec.Raw]:
        return [msgspec.Raw(msgspec.json.encode(shortened(vector, dimensions))) for vector in vectors]

    return await _run_off_loop(encoded, len(vectors))


async def rows_as_json(vectors: Sequence[Sequence[float] | None]) -> list[msgspec.Raw | None]:
    """Encode vectors unchanged as JSON, in a thread if there are many; None stays."""

    def encoded() -> list[msgspec.Raw | None]:
        return [None if row is None else msgspec.Raw(msgspec.json.encode(list(row))) for row in vectors]

    return await _run_off_loop(encoded, len(vectors))


async def _run_off_loop(work: Callable[[], T], vectors: int) -> T:
    """Return the result of ``work``, done in a thread if there are many ``vectors``.

    It encodes them one by one, since encoding keeps other threads from running.
    """
    return work() if vectors <= _MAX_ON_LOOP else await asyncio.to_thread(work)


def _call(model: Model, texts: Sequence[str], *, normalize: bool) -> Call:
    body = {
        "model": model.name,
        "input": list(texts),
        "encoding_format": "float",
        "embd_normalize": 2 if normalize else -1,
    }
    return Call("/v1/embeddings", body)


class _Vector(msgspec.Struct):
    embedding: list[float]
    index: int = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0


class _Answer(msgspec.Struct):
    data: list[_Vector]
    usage: _Usage = msgspec.field(default_factory=_Usage)


_answer = msgspec.json.Decoder(_Answer)


def read_embeddings(raw: bytes) -> tuple[list[list[float]], int]:
    """Return the vectors, in the texts' order, and the token count of a ``/v1/embeddings`` response.

    Raises:
        Refusal: ENGINE if the response is unreadable.
    """
    answer = decoded(raw, _answer, "embeddings from the engine")
    ordered = sorted(answer.data, key=lambda vector: vector.index)
    return [vector.embedding for vector in ordered], answer.usage.prompt_tokens


def normalized(vector: list[float]) -> list[float]:
    """Scale ``vector`` to length 1; a zero vector stays."""
    length = math.sqrt(math.fsum(x * x for x in vector))
    return [x / length for x in vector] if length > 0 else vector


def shortened(vector: list[float], dimensions: int | None) -> list[float]:
    """Return the first ``dimensions`` components of a vector, scaled to length 1 (Matryoshka)."""
    if dimensions is not None and 0 < dimensions < len(vector):
        vector = vector[:dimensions]
    return normalized(vector)
