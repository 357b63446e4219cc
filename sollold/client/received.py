"""The received part of a streamed answer, and the request for the rest from another node. Pure."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from sollold.facts import dataclass


@dataclass(slots=True)
class Received:
    """The accumulated records of one answer.

    Attributes:
        content, thinking: pieces of text, in order.
        tool_calls: complete tool calls.
        events: number of records with text, about one per token.
        reached: a node accepted the request.
        began: time of the first record on the monotonic clock; 0: none yet.
        spent: seconds of generation by nodes that were lost.
        lost: names of lost nodes.
        lost_at: time of the last loss, until the answer resumes.
        gap: total seconds without text after losses.
    """

    content: list[str] = field(default_factory=list)
    thinking: list[str] = field(default_factory=list)
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    events: int = 0
    backend: str = ""
    reached: bool = False
    began: float = 0.0
    spent: float = 0.0
    lost: list[str] = field(default_factory=list)
    lost_at: float = 0.0
    gap: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.content or self.thinking or self.tool_calls or self.logprobs)

    def add(self, record: dict[str, Any], now: float) -> bool:
        """Add a record; returns whether it carries anything."""
        message = record.get("message")
        source = message if isinstance(message, dict) else record
        text = source.get("content" if source is message else "response")
        thinking = source.get("thinking")
        calls = source.get("tool_calls") if source is message else None
        logprobs = record.get("logprobs")
        if text:
            self.content.append(text)
        if thinking:
            self.thinking.append(thinking)
        if calls:
            self.tool_calls.extend(calls)
        if logprobs:
            self.logprobs.extend(logprobs)
        if text or thinking:
            self.events += 1
        has_content = bool(text or thinking or calls or logprobs)
        if has_content:
            self.began = self.began or now
            if self.lost_at:
                self.gap += now - self.lost_at
                self.lost_at = 0.0
        return has_content

    def node_lost(self, name: str, now: float) -> None:
        """Note that the answering node is gone."""
        self.lost.append(name)
        self.lost_at = self.lost_at or now
        if self.began:
            self.spent += now - self.began
            self.began = 0.0

    def forget(self) -> None:
        """Discard the received part, to restart the answer before anything was delivered."""
        self.content.clear()
        self.thinking.clear()
        self.tool_calls.clear()
        self.logprobs.clear()
        self.events, self.began, self.spent = 0, 0.0, 0.0

    def request(self, body: dict[str, Any]) -> dict[str, Any]:
        """``body`` extended to request the missing rest."""
        if not self:
            return body
        resume: dict[str, Any] = {
            "content": "".join(self.content),
            "thinking": "".join(self.thinking),
            "events": self.events,
            "tool_calls": len(self.tool_calls),
            "logprobs": bool(self.logprobs),
            "spent_ms": round(self.spent * 1000, 3),
        }
        if self.backend:
            resume["backend"] = self.backend
        return {**body, "resume": resume}

    def finish(self, record: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The last record, with the figures of the complete answer; ``seconds``: duration of the request."""
        routing = record.setdefault("_routing", {})
        if not self.lost:
            return record
        routing["resumed"] = int(routing.get("resumed") or 0) + len(self.lost)
        routing["gap_ms"] = round(float(routing.get("gap_ms") or 0.0) + self.gap * 1000, 3)
        routing["duration_ms"] = round(seconds * 1000, 3)
        routing["lost_nodes"] = list(self.lost)
        if "total_duration" in record:
            record["total_duration"] = int(seconds * 1e9)
        return record

    def whole(self, last: dict[str, Any]) -> dict[str, Any]:
        """The complete answer in one record, as without streaming."""
        content, thinking = "".join(self.content), "".join(self.thinking)
        message = last.get("message")
        if isinstance(message, dict):
            message["content"] = content
            if thinking:
                message["thinking"] = thinking
            if self.tool_calls:
                message["tool_calls"] = list(self.tool_calls)
        else:
            last["response"] = content
            if thinking:
                last["thinking"] = thinking
        if self.logprobs:
            last["logprobs"] = list(self.logprobs)
        return last
