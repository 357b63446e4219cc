"""The request body of ``/v1/responses``."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from sollold.api.engine.number_ranges import Limit, Share, Temperature, TopLogprobs
from sollold.api.engine.placement import V1Fields


class ResponseAsk(V1Fields, kw_only=True):
    """``POST /v1/responses``."""

    input: str | list[dict[str, Any]] | None = None
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: Limit | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    include: list[str] | None = None
    top_logprobs: TopLogprobs | None = None
    previous_response_id: str | None = None
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None
    truncation: str | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None

    def configured(self) -> ResponseAsk:
        """Return the request with the effort and the format that items of its input set last."""
        reasoning, text = self.reasoning, self.text
        for item in self.input if isinstance(self.input, list) else ():
            if item.get("type") != "configuration_update":
                continue
            if isinstance(update := item.get("reasoning"), dict):
                reasoning = {**(reasoning or {}), **update}
            if isinstance(update := item.get("text"), dict):
                text = {**(text or {}), **update}
        return replace(self, reasoning=reasoning, text=text)

    @property
    def alternatives(self) -> int | None:
        """Number of alternatives to show per token; None if no probabilities were requested."""
        return (self.top_logprobs or 0) if "message.output_text.logprobs" in (self.include or ()) else None
