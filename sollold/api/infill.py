"""llama-server's ``/infill``, for a ``suffix`` in other dialects: its events have their own form. Pure.

It takes a schema where the others take a ``response_format``, and no images, system text or template.
"""

from __future__ import annotations

import secrets
import time
from typing import Any

import msgspec

from sollold.api.ollama_chat import Logprobs, TokenLogprob, read_chunk
from sollold.api.openai_request import Completion
from sollold.api.sse import ChunkForm
from sollold.serving.ask import Engine, Fault, Refusal, Routing


class Infilled(msgspec.Struct):
    """An event."""

    content: str = ""
    stop: bool = False
    stop_type: str = ""
    tokens_predicted: int = 0
    tokens_evaluated: int = 0
    completion_probabilities: list[TokenLogprob] = []

    @property
    def finish(self) -> str:
        """OpenAI's reason for the end; empty when it is not there yet."""
        if not self.stop and not self.stop_type:
            return ""
        return "length" if self.stop_type == "limit" else "stop"

    @property
    def logprobs(self) -> Logprobs | None:
        """Log probabilities as the other routes give them."""
        return Logprobs(self.completion_probabilities) if self.completion_probabilities else None


_infilled = msgspec.json.Decoder(Infilled)


def read_infilled(raw: bytes) -> Infilled:
    """An event of ``/infill``.

    Raises:
        Refusal: ENGINE, when the event is an error or can't be read.
    """
    read_chunk(raw)
    try:
        return _infilled.decode(raw)
    except msgspec.MsgspecError as error:
        raise Refusal(Fault.ENGINE, f"the engine sent what can't be read: {error}") from None


def infill_of(body: dict[str, Any], ask: Completion) -> dict[str, Any]:
    """The body of a completion with a suffix, ``completion_body`` of it given, as ``/infill`` takes it.

    Raises:
        Refusal: BAD_REQUEST.
    """
    if not isinstance(ask.prompt, str):
        raise Refusal(Fault.BAD_REQUEST, "with a suffix the prompt is one text")
    if ask.n is not None and ask.n > 1:
        raise Refusal(Fault.BAD_REQUEST, "with a suffix there is one answer; ask again for another")
    left = ("prompt", "max_tokens", "logprobs", "n", "stream_options", "response_format")
    out = {key: value for key, value in body.items() if key not in left}
    out |= {"input_prefix": ask.prompt, "input_suffix": ask.suffix or ""}
    if ask.max_tokens is not None:
        out["n_predict"] = ask.max_tokens
    if ask.logprobs:
        out["n_probs"] = ask.logprobs
    return out


class InfillForm(ChunkForm):
    """`Form` of a completion with a suffix: OpenAI's chunks, whichever engine answers."""

    def __init__(self, ask: Completion, model: str) -> None:
        super().__init__()
        self._usage = ask.stream_options is not None and bool(ask.stream_options.include_usage)
        self._engine = Engine.LLAMA
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def begin(self, routing: Routing) -> bytes:
        """Nothing; but the engine is known now."""
        self._engine = routing.engine
        return b""

    def event(self, raw: bytes) -> bytes:
        """The chunk for one event, and the counts after the last."""
        if self._engine is Engine.OLLAMA:
            return super().event(raw)
        event = read_infilled(raw)
        chunks = [self._chunk(event)]
        if event.finish and self._usage:
            chunks.append({**self._head, "choices": [], "usage": _usage(event)})
        return b"".join(b"data: " + msgspec.json.encode(chunk) + b"\n\n" for chunk in chunks)

    def whole(self, raw: bytes, routing: Routing) -> bytes:
        """The whole answer."""
        if routing.engine is Engine.OLLAMA:
            return super().whole(raw, routing)
        event = read_infilled(raw)
        return msgspec.json.encode({**self._chunk(event), "usage": _usage(event)})

    def _chunk(self, event: Infilled) -> dict[str, Any]:
        choice = {
            "index": 0,
            "text": event.content,
            "logprobs": event.logprobs,
            "finish_reason": event.finish or None,
        }
        return {**self._head, "choices": [choice]}


def _usage(event: Infilled) -> dict[str, int]:
    prompt, made = event.tokens_evaluated, event.tokens_predicted
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
