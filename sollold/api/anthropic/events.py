"""Translates the chunks of a chat into Anthropic's events and its whole message. Pure."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any

from sollold.api.engine.chunks import ToolPiece, object_of
from sollold.api.engine.encoders import Event, EventTranslator
from sollold.api.engine.sealed_thought import sealed
from sollold.api.engine.stop_sequences import StopSequences
from sollold.api.http.errors import Dialect, refusal_object
from sollold.errors import Refusal
from sollold.serving.request import Engine, Routing
from sollold.undecodable import UNDECODABLE


class MessageEvents(EventTranslator):
    """The events of one message, from ``message_start`` to ``message_stop``."""

    def __init__(
        self,
        model: str,
        stop_sequences: Sequence[str] = (),
        *,
        omit_thinking: bool = False,
        limit: int = 0,
        request: str = "",
        estimate: Callable[[], int] = lambda: 0,
    ) -> None:
        """``limit``: the caller's ``max_tokens``; ``request``: the request's id, for errors; ``estimate``
        returns the estimated length of the prompt in tokens, for an Ollama, which reports it only at the
        end."""
        super().__init__()
        self._estimate = estimate
        self._estimated = 0
        self._request = request
        self._limit = limit
        self._omits = omit_thinking
        self._id = "msg_" + secrets.token_hex(12)
        self._model = model
        self._stops = StopSequences(stop_sequences)
        self._blocks: list[dict[str, Any]] = []
        self._parts: list[str] = []
        """Text, thinking or JSON of the open block so far."""
        self._call = -1
        self._started = False

    @property
    def stopped(self) -> bool:
        """Whether a stop sequence was generated, so that the engine may be stopped."""
        return self._stops.found is not None

    def start(self, routing: Routing) -> list[Event]:
        """Return no events: ``message_start`` needs the prompt's length, which comes with the first chunk."""
        if routing.engine is Engine.OLLAMA:
            self._estimated = self._estimate()
        return []

    def keep_alive(self) -> list[Event]:
        """Return a ping, as Anthropic sends it."""
        return [{"type": "ping"}]

    def fail(self, refusal: Refusal) -> list[Event]:
        """Return the error as an event."""
        return [refusal_object(Dialect.ANTHROPIC, refusal, self._request)]

    def _begin(self) -> list[Event]:
        if self._started:
            return []
        self._started = True
        message = {**self._head(), "content": [], "stop_reason": None, "stop_sequence": None}
        return [{"type": "message_start", "message": {**message, "usage": self._usage()}}]

    def _head(self) -> Event:
        return {"id": self._id, "type": "message", "role": "assistant", "model": self._model}

    def _usage(self) -> Event:
        timings, usage = self._account.timings, self._account.usage
        prompt = usage.prompt_tokens or timings.prompt_n + timings.cache_n or self._estimated
        return {
            "input_tokens": max(0, prompt - timings.cache_n),
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": min(prompt, timings.cache_n),
            "output_tokens": self._account.tokens,
            "output_tokens_details": {"thinking_tokens": self._account.thought_tokens},
        }

    def _think(self, text: str) -> list[Event]:
        return [*self._say_rest(), *self._add("thinking", text)]

    def _say(self, text: str) -> list[Event]:
        text = self._stops.feed(text)
        return self._add("text", text) if text else []

    def _say_rest(self) -> list[Event]:
        """Say what may have been the beginning of a stop sequence: something else follows it."""
        rest = self._stops.flush()
        return self._add("text", rest) if rest else []

    def _add(self, kind: str, text: str) -> list[Event]:
        """Add text to a block of text or thinking."""
        events: list[Event] = []
        if not self._blocks or self._blocks[-1]["type"] != kind or self._call >= 0:
            block: Event = {"type": kind, kind: ""}
            if kind == "thinking":
                block["signature"] = ""
            events += self._open(block)
            self._call = -1
        self._parts.append(text)
        if kind == "thinking" and self._omits:
            return events
        return [*events, self._delta(f"{kind}_delta", **{kind: text})]

    def _delta(self, kind: str, **content: str) -> Event:
        """Return an event with more of the open block."""
        delta = {"type": kind, **content}
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    def _tool(self, piece: ToolPiece, position: int) -> list[Event]:
        """Add a piece of a tool call."""
        events: list[Event] = []
        index = piece.number(position)
        if index != self._call:
            id_ = piece.id or "toolu_" + secrets.token_hex(12)
            events += self._say_rest()
            events += self._open({"type": "tool_use", "id": id_, "name": piece.name, "input": {}})
            self._call = index
        if arguments := piece.arguments:
            self._parts.append(arguments)
            events.append(self._delta("input_json_delta", partial_json=arguments))
        return events

    def _open(self, block: Event) -> list[Event]:
        events = self._close()
        self._blocks.append(block)
        # A copy: the block is filled later, but the start event must show it empty.
        start = {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": dict(block)}
        return [*events, start]

    def _close(self) -> list[Event]:
        """End the open block."""
        if not self._blocks:
            return []
        block, text = self._blocks[-1], "".join(self._parts)
        self._parts = []
        if block["type"] == "tool_use":
            try:
                block["input"] = object_of(text)
            except UNDECODABLE:
                # Cut off by max_tokens: a stream can deliver the truncated JSON, a whole message can't.
                block["input"] = {}
        elif block["type"] == "thinking":
            # Some clients return thinking without a signature as text.
            block["signature"] = sealed(text if self._omits else "")
            block["thinking"] = "" if self._omits else text
        else:
            block["text"] = text
        end = {"type": "content_block_stop", "index": len(self._blocks) - 1}
        if block["type"] != "thinking":
            return [end]
        return [self._delta("signature_delta", signature=block["signature"]), end]

    def _reason(self) -> str:
        if self._stops.found is not None:
            return "stop_sequence"
        if self._account.finish == "length" and self._account.tokens < self._limit:
            return "model_context_window_exceeded"
        words = {"length": "max_tokens", "tool_calls": "tool_use"}
        return words.get(self._account.finish, "end_turn")

    def last_events(self) -> list[Event]:
        """End the open block, then send ``message_delta`` and ``message_stop``."""
        events = [*self._begin(), *self._say_rest(), *self._close()]
        delta = {"stop_reason": self._reason(), "stop_sequence": self._stops.found}
        events.append({"type": "message_delta", "delta": delta, "usage": self._usage()})
        events.append({"type": "message_stop"})
        return events

    def result(self) -> Event:
        """Return the whole message; call it after `last_events`."""
        return {
            **self._head(),
            "content": self._blocks,
            "stop_reason": self._reason(),
            "stop_sequence": self._stops.found,
            "usage": self._usage(),
        }
