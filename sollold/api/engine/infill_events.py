"""Decodes the events of an engine's infill stream."""

from __future__ import annotations

import msgspec

from sollold.api.engine.chunks import Logprobs, TokenLogprob, read_chunk
from sollold.errors import Fault, Refusal


class Infilled(msgspec.Struct):
    """One event of ``/infill``."""

    content: str = ""
    stop: bool = False
    stop_type: str = ""
    tokens_predicted: int = 0
    tokens_evaluated: int = 0
    completion_probabilities: list[TokenLogprob] = []

    @property
    def finish(self) -> str:
        """OpenAI's ``finish_reason``; empty before the end."""
        if not self.stop and not self.stop_type:
            return ""
        return "length" if self.stop_type == "limit" else "stop"

    @property
    def logprobs(self) -> Logprobs | None:
        """Log-probabilities in the form of the other routes."""
        return Logprobs(self.completion_probabilities) if self.completion_probabilities else None


_infilled = msgspec.json.Decoder(Infilled)


def read_infilled(raw: bytes) -> Infilled:
    """Decode an event of ``/infill``.

    Raises:
        Refusal: ENGINE if the event is an error or can't be read.
    """
    read_chunk(raw)
    try:
        return _infilled.decode(raw)
    except msgspec.MsgspecError as error:
        raise Refusal(Fault.ENGINE, f"unreadable response from the engine: {error}") from None
