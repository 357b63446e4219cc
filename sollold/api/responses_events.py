"""Chunks of a chat become the events of ``/v1/responses`` and its whole response. Pure."""

from __future__ import annotations

import secrets
import time
from typing import Any

import msgspec

from sollold.api.ollama_chat import Account, Said, ToolPiece, read_chunk
from sollold.api.responses_request import ResponseAsk
from sollold.serving.ask import Refusal

Event = dict[str, Any]


class ResponseEvents:
    """One response. ``feed`` gives the events for a chunk, ``end`` the last; ``response`` is the whole."""

    def __init__(self, ask: ResponseAsk) -> None:
        self._ask = ask
        self._id = "resp_" + secrets.token_hex(16)
        self._created = int(time.time())
        self._output: list[Event] = []
        self._parts: list[str] = []
        """Of the item that is open: its text, thinking or arguments so far."""
        self._call = -1
        self._number = 0
        self._account = Account()
        self._status = "in_progress"
        self._error: Event | None = None

    def _event(self, type_: str, **fields: Any) -> Event:
        event = {"type": type_, "sequence_number": self._number, **fields}
        self._number += 1
        return event

    def start(self) -> list[Event]:
        """The events before the first chunk."""
        return [
            self._event("response.created", response=self.response()),
            self._event("response.in_progress", response=self.response()),
        ]

    def feed(self, raw: bytes) -> list[Event]:
        """The events for one chunk.

        Raises:
            Refusal: ENGINE, when the chunk is an error.
        """
        chunk = read_chunk(raw)
        self._account.feed(chunk)
        events: list[Event] = []
        for choice in chunk.choices:
            said = choice.delta or Said()
            if choice.finish_reason:
                self._account.finish = choice.finish_reason
            if said.thought:
                events += self._add("reasoning", said.thought)
            if said.content:
                events += self._add("message", said.content)
            for place, piece in enumerate(said.tool_calls or ()):
                events += self._tool(piece, place)
        return events

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}

    def _add(self, kind: str, text: str) -> list[Event]:
        """More of a message or of thinking."""
        events: list[Event] = []
        if not self._output or self._output[-1]["type"] != kind:
            events += self._open(kind)
        self._parts.append(text)
        if kind == "message":
            delta = self._event(
                "response.output_text.delta", **self._place(), content_index=0, delta=text, logprobs=[]
            )
        else:
            delta = self._event("response.reasoning_text.delta", **self._place(), content_index=0, delta=text)
        return [*events, delta]

    def _open(self, kind: str) -> list[Event]:
        events = self._close()
        item: Event = {"id": ("msg_" if kind == "message" else "rs_") + secrets.token_hex(16), "type": kind}
        item |= {"status": "in_progress"}
        item |= {"role": "assistant", "content": []} if kind == "message" else {"summary": [], "content": []}
        self._call = -1
        self._output.append(item)
        index = len(self._output) - 1
        events.append(self._event("response.output_item.added", output_index=index, item=dict(item)))
        if kind == "message":
            part = _text_part("")
            events.append(
                self._event("response.content_part.added", **self._place(), content_index=0, part=part)
            )
        return events

    def _tool(self, piece: ToolPiece, place: int) -> list[Event]:
        """More of a function call."""
        events: list[Event] = []
        index = piece.index if piece.index is not None else place
        function = piece.function
        if index != self._call:
            events += self._close()
            item = {
                "id": "fc_" + secrets.token_hex(16),
                "type": "function_call",
                "status": "in_progress",
                "call_id": piece.id or "call_" + secrets.token_hex(12),
                "name": (function.name if function is not None else None) or "",
                "arguments": "",
            }
            self._call = index
            self._output.append(item)
            where = len(self._output) - 1
            events.append(self._event("response.output_item.added", output_index=where, item=dict(item)))
        arguments = function.arguments if function is not None else None
        if isinstance(arguments, dict):
            arguments = msgspec.json.encode(arguments).decode()
        if arguments:
            self._parts.append(arguments)
            kind = "response.function_call_arguments.delta"
            events.append(self._event(kind, **self._place(), delta=arguments))
        return events

    def _close(self) -> list[Event]:
        """End the item that is open."""
        if not self._output or self._output[-1]["status"] != "in_progress":
            return []
        item, text = self._output[-1], "".join(self._parts)
        self._parts = []
        item["status"] = "completed" if self._account.finish != "length" else "incomplete"
        events: list[Event] = []
        if item["type"] == "message":
            part = _text_part(text)
            item["content"] = [part]
            done = self._event(
                "response.output_text.done", **self._place(), content_index=0, text=text, logprobs=[]
            )
            events.append(done)
            events.append(
                self._event("response.content_part.done", **self._place(), content_index=0, part=part)
            )
        elif item["type"] == "reasoning":
            item["content"] = [{"type": "reasoning_text", "text": text}]
            events.append(
                self._event("response.reasoning_text.done", **self._place(), content_index=0, text=text)
            )
        else:
            item["arguments"] = text or "{}"
            kind = "response.function_call_arguments.done"
            events.append(self._event(kind, **self._place(), name=item["name"], arguments=item["arguments"]))
        index = len(self._output) - 1
        events.append(self._event("response.output_item.done", output_index=index, item=dict(item)))
        return events

    def end(self) -> list[Event]:
        """The events that end it."""
        events = self._close()
        self._status = "incomplete" if self._account.finish == "length" else "completed"
        return [*events, self._event(f"response.{self._status}", response=self.response())]

    def fail(self, refusal: Refusal, error: dict[str, Any]) -> list[Event]:
        """The events of an error; ``error`` is the dialect's own object.

        Agents (Codex) look for the response that failed, OpenAI's own clients for the error.
        """
        code = error.get("code") or refusal.fault.value
        self._status, self._error = "failed", {"code": code, "message": refusal.message}
        return [
            self._event("response.failed", response=self.response()),
            self._event("error", code=code, message=refusal.message, param=None, error=error),
        ]

    def response(self) -> Event:
        """The response as it stands; whole after `end`."""
        ask, account = self._ask, self._account
        usage: Event | None = None
        if self._status != "in_progress":
            prompt, made = account.usage.prompt_tokens, account.usage.completion_tokens
            usage = {
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": min(prompt, account.timings.cache_n)},
                "output_tokens": made,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": prompt + made,
            }
        cut = self._status == "incomplete"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": self._status,
            "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": ask.instructions,
            "max_output_tokens": ask.max_output_tokens,
            "model": ask.model,
            "output": list(self._output),
            "parallel_tool_calls": ask.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": ask.reasoning or {"effort": None, "summary": None},
            "store": False,
            "temperature": ask.temperature,
            "text": ask.text or {"format": {"type": "text"}},
            "tool_choice": ask.tool_choice or "auto",
            "tools": ask.tools or [],
            "top_p": ask.top_p,
            "truncation": "disabled",
            "usage": usage,
            "metadata": {},
        }


def _text_part(text: str) -> Event:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
