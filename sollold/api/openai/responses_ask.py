"""What clients of ``/v1/responses`` send."""

from __future__ import annotations

from typing import Any

import msgspec


class ResponseAsk(msgspec.Struct, kw_only=True):
    """``POST /v1/responses``."""

    model: str = ""
    input: str | list[dict[str, Any]] | None = None
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    include: list[str] | None = None
    previous_response_id: str | None = None
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None
    truncation: str | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    priority: int | str | None = None
    timeout: float | str | None = None
    keep_alive: float | str | None = None
