"""Continues ``/api/chat`` and ``/api/generate`` of Ollama."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from sollold.serving.request import Call, Delivered
from sollold.serving.resume.base import Continuation, JsonObject, NotResumable, asked_for, reduce_limits
from sollold.units import timestamp_text


class OllamaContinuation(Continuation):
    """A stream of Ollama's JSON lines.

    A chat gets the delivered part as a trailing assistant message, which Ollama continues. A raw prompt is
    extended. Any other prompt is put into a template by Ollama, so it is continued as a chat, whose events
    are converted to the old format.
    """

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self._chat = call.path == "/api/chat"
        self._head: JsonObject = {}

    def check(self) -> None:
        """Raise `NotResumable` if the stream can't be continued exactly."""
        self.fold()
        body = self.call.body
        if asked_for(body, "logprobs"):
            raise NotResumable("it contains log probabilities")
        if self._tool_call:
            raise NotResumable("a tool call was sent, and others may have been in progress")
        if not self.text:
            return
        if asked_for(body, "format"):
            raise NotResumable("it uses a format, which Ollama can't continue in the middle")
        if any(self._thinking) and not any(self._content):
            raise NotResumable("it was interrupted while thinking, which Ollama can't continue")
        if not self._chat and not body.get("raw"):
            for key in ("template", "suffix", "context"):
                if body.get(key):
                    raise NotResumable(f"Ollama can't continue an answer to a request with {key!r}")

    def _read(self, event: JsonObject) -> None:
        message = event.get("message") if self._chat else event
        if isinstance(message, dict):
            content = message.get("content" if self._chat else "response")
            self._add(content, message.get("thinking"), message.get("tool_calls"))
        if event.get("done"):
            self._finished = True
        self._head = {key: event[key] for key in ("model", "created_at") if key in event}

    def _restore(self, delivered: Delivered) -> None:
        super()._restore(delivered)
        self._head = {"model": self.call.body.get("model"), "created_at": timestamp_text(time.time())}

    def _continuation(self) -> Call:
        body = dict(self.call.body)
        content, thinking = self._joined()
        if not content and not thinking:
            return self.call
        options = dict(body.get("options") or {})
        reduce_limits(options, ("num_predict",), self.tokens)
        if options:
            body["options"] = options
        if self._chat:
            messages = list(body.get("messages") or ())
        elif body.get("raw"):
            body["prompt"] = str(body.get("prompt") or "") + content
            return Call(self.call.path, body)
        else:
            messages = _as_messages(body)
        beginning: JsonObject = {"role": "assistant", "content": ""}
        if messages and messages[-1].get("role") == "assistant":
            beginning = dict(messages.pop())
        beginning["content"] = (beginning.get("content") or "") + content
        if thinking or beginning.get("thinking"):
            beginning["thinking"] = (beginning.get("thinking") or "") + thinking
        body["messages"] = [*messages, beginning]
        return Call("/api/chat", body)

    def closing(self) -> list[bytes]:
        """The end of an answer at its token limit: Ollama would take a remaining limit of 0 for no limit."""
        limit = (self.call.body.get("options") or {}).get("num_predict")
        reached = isinstance(limit, int) and 0 < limit <= self.tokens
        if self._finished or not reached or not self._head:
            return []
        spent_ns = int(self.spent_ms * 1e6)
        content = {"message": {"role": "assistant", "content": ""}} if self._chat else {"response": ""}
        last = {**self._head, **content, "done": True, "done_reason": "length", "total_duration": spent_ns}
        return [msgspec.json.encode({**last, "eval_count": self.tokens, "eval_duration": spent_ns})]

    def cut_short(self) -> list[bytes]:
        """A last event."""
        self.fold()
        content = {"message": {"role": "assistant", "content": ""}} if self._chat else {"response": ""}
        last = {**self._head, **content, "done": True, "done_reason": "stop", "eval_count": self.events}
        return [msgspec.json.encode({"model": self.call.body.get("model"), **last})]

    def _merge(self, event: JsonObject) -> JsonObject | None:
        if self._finished:
            return None
        if not self._chat and isinstance(event.get("message"), dict):
            message = event.pop("message")
            event["response"] = message.get("content") or ""
            if message.get("thinking"):
                event["thinking"] = message["thinking"]
        if event.get("done"):
            self._sum(event)
        return event

    def _sum(self, event: JsonObject) -> None:
        """Correct the counts and durations (in ns) to those of the whole answer."""
        spent_ns = int(self.spent_ms * 1e6)
        for key, increase in (
            ("eval_count", self.tokens),
            ("eval_duration", spent_ns),
            ("total_duration", spent_ns),
            ("prompt_eval_count", -self.tokens),
        ):
            if isinstance(event.get(key), int):
                event[key] = max(0, event[key] + increase)


def _as_messages(body: JsonObject) -> list[Any]:
    messages: list[Any] = []
    if system := body.pop("system", None):
        messages.append({"role": "system", "content": system})
    user: JsonObject = {"role": "user", "content": body.pop("prompt", None) or ""}
    if images := body.pop("images", None):
        user["images"] = images
    messages.append(user)
    return messages
