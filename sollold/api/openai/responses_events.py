"""Translates the chunks of a chat into the events of ``/v1/responses`` and its whole response. Pure."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec

from sollold.api.engine.chunks import ToolPiece, logprob_objects, object_of
from sollold.api.engine.encoders import Event, EventTranslator
from sollold.api.engine.sealed_thought import sealed
from sollold.api.http.errors import Dialect, is_too_long, refusal_object
from sollold.api.openai.responses_ask import ResponseAsk
from sollold.api.openai.responses_tools import SEARCH, OwnTool
from sollold.errors import Refusal
from sollold.serving.request import Routing
from sollold.undecodable import UNDECODABLE


def _random_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}"


_CALL_IDS = {"function": "fc", "custom": "ctc", SEARCH: "tsc"}
"""Kind of tool → prefix of its calls' ids."""
_EVENT_EVERY = 6
"""Of so many keep-alives (one each 5 s) one is an event: clients end a stream after minutes without any."""


class _Form(NamedTuple):
    """The names of a text's events, the type of its part, and the field of its item with the part."""

    part_events: str
    text_events: str
    type: str
    field: str


_FORMS = {
    "message": _Form("content_part", "output_text", "output_text", "content"),
    "reasoning": _Form("content_part", "reasoning_text", "reasoning_text", "content"),
    "summary": _Form("reasoning_summary_part", "reasoning_summary_text", "summary_text", "summary"),
}


class ResponseEvents(EventTranslator):
    """The events of one response, from ``response.created`` to its end."""

    def __init__(
        self,
        ask: ResponseAsk,
        own: Mapping[str, OwnTool],
        new_id: Callable[[str], str] = _random_id,
        on_end: Callable[[Event], None] = lambda response: None,
    ) -> None:
        """``own``: the caller's tools by the names that the model knows; ``new_id`` makes an id with a
        prefix; ``on_end`` receives the whole response when it has ended without an error.
        """
        super().__init__()
        self._ask = ask
        self._new_id = new_id
        self._on_end = on_end
        self._own = own
        self._summary = bool((ask.reasoning or {}).get("summary"))
        """Whether the caller asked for a summary; the thinking is then sent as one."""
        self._seals = "reasoning.encrypted_content" in (ask.include or ())
        self._alternatives = ask.alternatives
        self._id = new_id("resp")
        self._created = int(time.time())
        self._output: list[Event] = []
        self._parts: list[str] = []
        """Text, thinking or arguments of the open item so far."""
        self._tokens: list[Event] = []
        """Log-probabilities of the open message's tokens so far."""
        self._call = -1
        self._number = self._kept_alive = 0
        self._status = "in_progress"
        self._error: Event | None = None

    def _event(self, type_: str, **fields: Any) -> Event:
        event = {"type": type_, "sequence_number": self._number, **fields}
        self._number += 1
        return event

    def start(self, routing: Routing) -> list[Event]:
        """Return the events before the first chunk."""
        return [] if self._number else self.keep_alive()

    def keep_alive(self) -> list[Event]:
        """Return ``response.in_progress``, after ``response.created`` if nothing was sent before.

        Most times no events: each repeats the whole response with its tools.
        """
        self._kept_alive += 1
        if self._number and self._kept_alive % _EVENT_EVERY:
            return []
        kinds = ("response.in_progress",) if self._number else ("response.created", "response.in_progress")
        return [self._event(kind, response=self.result()) for kind in kinds]

    def _think(self, text: str) -> list[Event]:
        return self._add("reasoning", text)

    def _say(self, text: str) -> list[Event]:
        return self._add("message", text)

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}

    def _add(self, kind: str, text: str) -> list[Event]:
        """Add text to a message or to the thinking."""
        events: list[Event] = []
        if not self._output or self._output[-1]["type"] != kind:
            events += self._open(kind)
        self._parts.append(text)
        tokens = self._probabilities() if kind == "message" else []
        self._tokens += tokens
        form, further = self._form(kind), {"logprobs": tokens} if kind == "message" else {}
        return [*events, self._part_event(form, f"{form.text_events}.delta", delta=text, **further)]

    def _form(self, kind: str) -> _Form:
        return _FORMS["summary" if kind == "reasoning" and self._summary else kind]

    def _part_event(self, form: _Form, name: str, **fields: Any) -> Event:
        return self._event(f"response.{name}", **self._place(), **{f"{form.field}_index": 0}, **fields)

    def _probabilities(self) -> list[Event]:
        """Log-probabilities of the current event's tokens, if the caller asked for them."""
        if self._alternatives is None:
            return []
        return [{"top_logprobs": [], **row} for row in logprob_objects(self._logprobs, self._alternatives)]

    def _open(self, kind: str) -> list[Event]:
        events = self._close()
        item: Event = {"id": self._new_id("msg" if kind == "message" else "rs"), "type": kind}
        item |= {"status": "in_progress"}
        item |= {"role": "assistant", "content": []} if kind == "message" else {"summary": [], "content": []}
        self._call = -1
        self._output.append(item)
        index = len(self._output) - 1
        events.append(self._event("response.output_item.added", output_index=index, item=dict(item)))
        form = self._form(kind)
        return [*events, self._part_event(form, f"{form.part_events}.added", part=_part(form, "", []))]

    def _tool(self, piece: ToolPiece, position: int) -> list[Event]:
        """Add a piece of a tool call."""
        events: list[Event] = []
        index = piece.number(position)
        if index != self._call:
            events += self._close()
            item = self._call_item(piece.name, piece.id or "call_" + secrets.token_hex(12))
            self._call = index
            self._output.append(item)
            last = len(self._output) - 1
            events.append(self._event("response.output_item.added", output_index=last, item=dict(item)))
        arguments = piece.arguments
        self._parts.append(arguments)
        if arguments and self._output[-1]["type"] == "function_call":
            kind = "response.function_call_arguments.delta"
            events.append(self._event(kind, **self._place(), delta=arguments))
        return events

    def _call_item(self, name: str, id_: str) -> Event:
        """Return the item of a new call, in the form of the tool's kind and under the caller's name."""
        own = self._own.get(name)
        kind = own.kind if own is not None else "function"
        item: Event = {"id": self._new_id(_CALL_IDS[kind]), "type": f"{kind}_call", "status": "in_progress"}
        if kind == SEARCH:
            return {**item, "call_id": id_, "execution": "client", "arguments": {}}
        if kind == "custom":
            item["type"] = "custom_tool_call"
        item |= {"call_id": id_, "name": own.name if own is not None else name}
        if own is not None and own.namespace:
            item["namespace"] = own.namespace
        return {**item, "input" if kind == "custom" else "arguments": ""}

    def _close(self) -> list[Event]:
        """End the open item."""
        if not self._output or self._output[-1]["status"] != "in_progress":
            return []
        item, text = self._output[-1], "".join(self._parts)
        self._parts = []
        item["status"] = "completed" if self._account.finish != "length" else "incomplete"
        events: list[Event] = []
        if item["type"] in _FORMS:
            events += self._close_text(item, text)
        elif item["type"] == f"{SEARCH}_call":
            with contextlib.suppress(*UNDECODABLE):
                item["arguments"] = object_of(text)
        elif item["type"] == "custom_tool_call":
            # Its text is known only when the enclosing arguments are complete.
            item["input"] = _input_of(text)
            kind = "response.custom_tool_call_input"
            events.append(self._event(f"{kind}.delta", **self._place(), delta=item["input"]))
            events.append(self._event(f"{kind}.done", **self._place(), input=item["input"]))
        else:
            item["arguments"] = text or "{}"
            kind = "response.function_call_arguments.done"
            events.append(self._event(kind, **self._place(), name=item["name"], arguments=item["arguments"]))
        index = len(self._output) - 1
        events.append(self._event("response.output_item.done", output_index=index, item=dict(item)))
        return events

    def _close_text(self, item: Event, text: str) -> list[Event]:
        form, further = self._form(item["type"]), {}
        tokens, self._tokens = self._tokens, []
        if item["type"] == "message":
            further = {"logprobs": tokens}
        elif self._seals:
            item["encrypted_content"] = sealed(text)
        part = _part(form, text, tokens)
        item[form.field] = [part]
        return [
            self._part_event(form, f"{form.text_events}.done", text=text, **further),
            self._part_event(form, f"{form.part_events}.done", part=part),
        ]

    def last_events(self) -> list[Event]:
        """End the open item, then send ``response.completed`` or ``response.incomplete``."""
        events = self._close()
        self._status = "incomplete" if self._account.finish == "length" else "completed"
        response = self.result()
        self._on_end(response)
        return [*events, self._event(f"response.{self._status}", response=response)]

    def fail(self, refusal: Refusal) -> list[Event]:
        """Return the events of an error.

        Agents (Codex) look for ``response.failed``, OpenAI's own clients for ``error``.
        """
        events = [] if self._number else self.keep_alive()
        error = refusal_object(Dialect.OPENAI, refusal)["error"]
        if is_too_long(refusal):
            # By these words of OpenAI's, clients recognize it in a stream.
            error["message"] = f"the input exceeds the context window: {refusal.message}"
        code, message = error.get("code") or refusal.fault.value, error["message"]
        self._status, self._error = "failed", {"code": code, "message": message}
        return [
            *events,
            self._event("response.failed", response=self.result()),
            self._event("error", code=code, message=message, param=None, error=error),
        ]

    def result(self) -> Event:
        """Return the response so far; complete after `last_events`."""
        ask, account = self._ask, self._account
        prompt, generated = account.usage.prompt_tokens, account.usage.completion_tokens
        cached = min(prompt, account.timings.cache_n)
        usage = {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": generated,
            "output_tokens_details": {"reasoning_tokens": account.thought_tokens},
            "total_tokens": prompt + generated,
        }
        incomplete = self._status == "incomplete"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": self._status,
            "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if incomplete else None,
            "instructions": ask.instructions,
            "max_output_tokens": ask.max_output_tokens,
            "model": ask.model,
            "output": list(self._output),
            "parallel_tool_calls": ask.parallel_tool_calls is not False,
            "previous_response_id": ask.previous_response_id,
            "reasoning": ask.reasoning or {"effort": None, "summary": None},
            "store": ask.store is not False,
            "temperature": ask.temperature,
            "text": ask.text or {"format": {"type": "text"}},
            "tool_choice": ask.tool_choice or "auto",
            "tools": ask.tools or [],
            "top_p": ask.top_p,
            "truncation": ask.truncation or "disabled",
            "usage": usage,
            "metadata": ask.metadata or {},
        }


def _input_of(arguments: str) -> str:
    """Return the input of a custom tool's call; the raw arguments if they were cut off."""
    try:
        value = msgspec.json.decode(arguments)["input"]
    except (*UNDECODABLE, KeyError, TypeError):
        return arguments
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _part(form: _Form, text: str, tokens: list[Event]) -> Event:
    further = {"annotations": [], "logprobs": tokens} if form is _FORMS["message"] else {}
    return {"type": form.type, "text": text, **further}
