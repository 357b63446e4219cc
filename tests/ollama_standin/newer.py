"""Ollama's ``/v1/messages`` and ``/v1/responses``: translation of conversations and answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Protocol

from tests.ollama_standin.engine import Piece
from tests.ollama_standin.records import packed


class Form(Protocol):
    """One of the two formats."""

    def conversation(self, body: dict[str, Any]) -> dict[str, Any]:
        """Translate the request to that of ``/v1/chat/completions``."""
        ...

    def whole(self, model: str, answer: Piece) -> dict[str, Any]:
        """Return a non-streamed answer."""
        ...

    def begin(self, model: str) -> Iterator[bytes]:
        """Yield the first events of a streamed answer."""
        ...

    def delta(self, text: str) -> Iterator[bytes]:
        """Yield the events of a text delta."""
        ...

    def end(self, model: str, answer: Piece) -> Iterator[bytes]:
        """Yield the last events."""
        ...


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", "")) for part in content or () if isinstance(part, dict))


def _event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: {packed({'type': kind, **fields})}\n\n".encode()


def _function(tool: dict[str, Any], schema: str) -> dict[str, Any]:
    given = {"name": tool["name"], "description": tool.get("description", ""), "parameters": tool.get(schema)}
    return {"type": "function", "function": given}


def _call(id_: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


def _without_nothing(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


class Messages:
    """Anthropic's format."""

    def conversation(self, body: dict[str, Any]) -> dict[str, Any]:
        turns: list[dict[str, Any]] = []
        if body.get("system"):
            turns.append({"role": "system", "content": _text(body["system"])})
        for message in body.get("messages") or ():
            turns += self._turns(message)
        tools = [_function(tool, "input_schema") for tool in body.get("tools") or ()]
        return _without_nothing(
            model=body["model"], messages=turns, max_tokens=body.get("max_tokens"), tools=tools or None,
            temperature=body.get("temperature"), top_p=body.get("top_p"), stop=body.get("stop_sequences"),
        )  # fmt: skip

    def _turns(self, message: dict[str, Any]) -> Iterator[dict[str, Any]]:
        content = message["content"]
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        for part in parts:
            if part["type"] == "tool_result":
                yield {
                    "role": "tool",
                    "tool_call_id": part["tool_use_id"],
                    "content": _text(part.get("content")),
                }
        calls = [
            _call(part["id"], part["name"], json.dumps(part["input"]))
            for part in parts if part["type"] == "tool_use"
        ]  # fmt: skip
        text = _text([part for part in parts if part["type"] == "text"])
        if text or calls:
            yield {"role": message["role"], "content": text, **({"tool_calls": calls} if calls else {})}

    def whole(self, model: str, answer: Piece) -> dict[str, Any]:
        blocks: list[dict[str, Any]] = [{"type": "text", "text": answer.text}] if answer.text else []
        blocks += self._uses(answer)
        used = {"input_tokens": answer.prompt, "output_tokens": answer.count}
        return self._message(model, blocks, self._reason(answer)) | {"usage": used}

    def _uses(self, answer: Piece) -> list[dict[str, Any]]:
        return [
            {
                "type": "tool_use",
                "id": call["id"],
                "name": call["name"],
                "input": json.loads(call["arguments"]),
            }
            for call in answer.calls
        ]

    def _message(self, model: str, content: list[dict[str, Any]], reason: str | None) -> dict[str, Any]:
        named = {"id": "msg_1", "type": "message", "role": "assistant", "model": model}
        usage = {"input_tokens": 0, "output_tokens": 0}
        return {**named, "content": content, "stop_reason": reason, "stop_sequence": None, "usage": usage}

    def _reason(self, answer: Piece) -> str:
        return "tool_use" if answer.calls else {"length": "max_tokens"}.get(answer.reason, "end_turn")

    def begin(self, model: str) -> Iterator[bytes]:
        yield _event("message_start", message=self._message(model, [], None))
        yield _event("content_block_start", index=0, content_block={"type": "text", "text": ""})

    def delta(self, text: str) -> Iterator[bytes]:
        yield _event("content_block_delta", index=0, delta={"type": "text_delta", "text": text})

    def end(self, model: str, answer: Piece) -> Iterator[bytes]:
        yield _event("content_block_stop", index=0)
        for index, use in enumerate(self._uses(answer), 1):
            yield _event("content_block_start", index=index, content_block={**use, "input": {}})
            raw = {"type": "input_json_delta", "partial_json": json.dumps(use["input"])}
            yield _event("content_block_delta", index=index, delta=raw)
            yield _event("content_block_stop", index=index)
        ended = {"stop_reason": self._reason(answer), "stop_sequence": None}
        usage = {"input_tokens": answer.prompt, "output_tokens": answer.count}
        yield _event("message_delta", delta=ended, usage=usage)
        yield _event("message_stop")


class Responses:
    """OpenAI's Responses format."""

    def conversation(self, body: dict[str, Any]) -> dict[str, Any]:
        turns: list[dict[str, Any]] = []
        if body.get("instructions"):
            turns.append({"role": "system", "content": body["instructions"]})
        given = body.get("input") or ""
        for item in [{"role": "user", "content": given}] if isinstance(given, str) else given:
            kind = item.get("type", "message")
            if kind == "function_call":
                call = _call(item["call_id"], item["name"], item["arguments"])
                turns.append({"role": "assistant", "content": "", "tool_calls": [call]})
            elif kind == "function_call_output":
                turns.append(
                    {"role": "tool", "tool_call_id": item["call_id"], "content": _text(item["output"])}
                )
            elif kind == "message":
                role = {"developer": "system"}.get(item["role"], item["role"])
                turns.append({"role": role, "content": _text(item["content"])})
        tools = [_function(tool, "parameters") for tool in body.get("tools") or ()]
        return _without_nothing(
            model=body["model"], messages=turns, max_tokens=body.get("max_output_tokens"),
            tools=tools or None,
            temperature=body.get("temperature"), top_p=body.get("top_p"),
        )  # fmt: skip

    def whole(self, model: str, answer: Piece) -> dict[str, Any]:
        usage = {
            "input_tokens": answer.prompt, "output_tokens": answer.count,
            "total_tokens": answer.prompt + answer.count,
            "input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0},
        }  # fmt: skip
        output = [*([self._message(answer.text)] if answer.text else []), *self._calls(answer)]
        short = answer.reason == "length"
        ended: dict[str, Any] = {"status": "incomplete" if short else "completed"}
        if short:
            ended |= {"incomplete_details": {"reason": "max_output_tokens"}}
        return self._response(model) | ended | {"output": output, "usage": usage}

    def _response(self, model: str) -> dict[str, Any]:
        named = {
            "id": "resp_1",
            "object": "response",
            "created_at": 0,
            "status": "in_progress",
            "model": model,
        }
        return {**named, "output": [], "tools": [], "tool_choice": "auto", "parallel_tool_calls": True}

    def _message(self, text: str) -> dict[str, Any]:
        part = {"type": "output_text", "text": text, "annotations": []}
        named = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed"}
        return {**named, "content": [part]}

    def _calls(self, answer: Piece) -> list[dict[str, Any]]:
        return [
            {"type": "function_call", "id": f"fc_{call['id']}", "call_id": call["id"], "name": call["name"],
             "arguments": call["arguments"], "status": "completed"}
            for call in answer.calls
        ]  # fmt: skip

    def begin(self, model: str) -> Iterator[bytes]:
        yield _event("response.created", sequence_number=0, response=self._response(model))
        empty = {**self._message(""), "status": "in_progress", "content": []}
        yield _event("response.output_item.added", sequence_number=1, output_index=0, item=empty)
        part = self._message("")["content"][0]
        yield _event("response.content_part.added", sequence_number=2, **self._place(), part=part)

    def _place(self) -> dict[str, Any]:
        return {"item_id": "msg_1", "output_index": 0, "content_index": 0}

    def delta(self, text: str) -> Iterator[bytes]:
        yield _event(
            "response.output_text.delta", sequence_number=3, **self._place(), delta=text, logprobs=[]
        )

    def end(self, model: str, answer: Piece) -> Iterator[bytes]:
        place, item = self._place(), self._message(answer.text)
        yield _event("response.output_text.done", sequence_number=4, **place, text=answer.text, logprobs=[])
        yield _event("response.content_part.done", sequence_number=5, **place, part=item["content"][0])
        yield _event("response.output_item.done", sequence_number=6, output_index=0, item=item)
        for index, call in enumerate(self._calls(answer), 1):
            yield _event("response.output_item.added", sequence_number=7, output_index=index, item=call)
            yield _event("response.output_item.done", sequence_number=8, output_index=index, item=call)
        whole = self.whole(model, answer)
        yield _event(f"response.{whole['status']}", sequence_number=9, response=whole)
