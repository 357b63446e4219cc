"""Texts to vectors at either engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from sollold.api.ollama_embed import normalized, read_embeddings
from sollold.api.ollama_request import no_reranker
from sollold.api.reply import ask_whole
from sollold.api.shortening import Shortening
from sollold.models.model import Model
from sollold.serving.ask import Ask, Call, Engine, Fault, Refusal, Routing, Service


@dataclass(frozen=True, slots=True)
class Embedded:
    """``native``: an Ollama's own answer, as it gave it; else None, and the vectors are in their order."""

    vectors: list[list[float]]
    tokens: int
    routing: Routing
    native: dict[str, Any] | None = None


class Embedder:
    """Asks the service for embeddings."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def embed(
        self,
        ask: Ask,
        model: Model,
        texts: Sequence[str],
        native: Call,
        *,
        normalize: bool = True,
        truncate: bool = True,
    ) -> Embedded:
        """The vectors of ``texts``. ``ask``: everything but its calls. ``native``: the call to an Ollama.

        ``truncate``: a text that is too long is cut to what the engine takes.

        Raises:
            Refusal: as `Service.open`; BAD_REQUEST for a reranker.
        """
        no_reranker(model)
        calls = {Engine.OLLAMA: native}
        if not model.only_ollama:
            calls[Engine.LLAMA] = _call(model, texts, normalize=normalize)
        service = Shortening(self._service) if truncate else self._service
        raw, routing = await ask_whole(service, replace(ask, calls=calls))
        if routing.engine is Engine.OLLAMA:
            try:
                return Embedded([], 0, routing, msgspec.json.decode(raw, type=dict[str, Any]))
            except msgspec.MsgspecError as error:
                raise Refusal(Fault.ENGINE, f"Ollama's embeddings can't be read: {error}") from None
        vectors, tokens = read_embeddings(raw)
        if len(vectors) != len(texts):
            raise Refusal(Fault.ENGINE, f"the engine gave {len(vectors)} embeddings for {len(texts)} texts")
        return Embedded([normalized(one) for one in vectors] if normalize else vectors, tokens, routing)


def _call(model: Model, texts: Sequence[str], *, normalize: bool) -> Call:
    body = {
        "model": model.name,
        "input": list(texts),
        "encoding_format": "float",
        "embd_normalize": 2 if normalize else -1,
    }
    return Call("/v1/embeddings", body)
