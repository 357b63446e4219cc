"""The request bodies of ``/v1/messages`` and ``/v1/messages/count_tokens``."""

from __future__ import annotations

from typing import Any

import msgspec

from sollold.api.engine.number_ranges import Limit, Share, Small, Temperature
from sollold.api.engine.placement import V1Fields


class Thinking(msgspec.Struct):
    """``thinking``."""

    type: str = "disabled"
    budget_tokens: Small | None = None
    display: str | None = None

    @property
    def enabled(self) -> bool:
        """Whether the model may think."""
        return self.type in ("enabled", "adaptive")

    @property
    def omitted(self) -> bool:
        """Whether thinking is hidden: the caller receives and returns it only as its signature."""
        return self.display == "omitted"


class ToolChoice(msgspec.Struct):
    """``tool_choice``."""

    type: str = "auto"
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Turn(msgspec.Struct):
    """One message."""

    role: str
    content: str | list[dict[str, Any]] | None = None


class Tokens(V1Fields, kw_only=True):
    """``POST /v1/messages/count_tokens``."""

    messages: list[Turn] | None = None
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    mcp_servers: list[dict[str, Any]] | None = None
    output_config: dict[str, Any] | None = None
    thread: dict[str, Any] | None = None


class Messages(Tokens, kw_only=True):
    """``POST /v1/messages``."""

    max_tokens: Limit | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: Small | None = None
    output_format: dict[str, Any] | None = None
