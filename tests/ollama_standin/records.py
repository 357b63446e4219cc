"""The records of an answer in Ollama's and OpenAI's formats. ``model`` is the name of the model."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from tests.ollama_standin.engine import Piece


def add(whole: Piece, piece: Piece) -> None:
    """Add a piece to the accumulated answer."""
    whole.text += piece.text
    whole.thinking += piece.thinking
    whole.calls += piece.calls
    whole.logprobs += piece.logprobs
    if piece.reason:
        whole.reason, whole.prompt, whole.count = piece.reason, piece.prompt, piece.count
        whole.context = piece.context


def now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def delta(model: str, chat: bool, piece: Piece) -> dict[str, Any]:
    more: dict[str, Any] = {"thinking": piece.thinking} if piece.thinking else {}
    if chat:
        if piece.calls:
            more["tool_calls"] = [
                {
                    "id": call["id"],
                    "function": {
                        "index": index,
                        "name": call["name"],
                        "arguments": json.loads(call["arguments"]),
                    },
                }
                for index, call in enumerate(piece.calls)
            ]
        fields: dict[str, Any] = {"message": {"role": "assistant", "content": piece.text} | more}
    else:
        fields = {"response": piece.text} | more
    if piece.logprobs:
        fields["logprobs"] = piece.logprobs
    return {"model": model, "created_at": now(), **fields, "done": False}


def final(model: str, chat: bool, reason: str) -> dict[str, Any]:
    return delta(model, chat, Piece()) | {"done": True, "done_reason": reason}


def v1_message(piece: Piece) -> dict[str, Any]:
    """Return a message or delta in OpenAI's format, where thinking is called reasoning."""
    message: dict[str, Any] = {"role": "assistant", "content": piece.text}
    if piece.thinking:
        message["reasoning"] = piece.thinking
    if piece.calls:
        message["tool_calls"] = [
            {
                "id": call["id"],
                "index": index,
                "type": "function",
                "function": {"name": call["name"], "arguments": call["arguments"]},
            }
            for index, call in enumerate(piece.calls)
        ]
    return message


def v1_logprobs(piece: Piece) -> dict[str, Any]:
    return {"logprobs": {"content": piece.logprobs}} if piece.logprobs else {}


def line(value: dict[str, Any]) -> bytes:
    return packed(value).encode() + b"\n"


def packed(value: dict[str, Any]) -> str:
    """Return JSON without spaces, as Go writes it."""
    return json.dumps(value, separators=(",", ":"))


def v1(model: str, choices: list[dict[str, Any]], chat: bool, *, chunk: bool = False) -> dict[str, Any]:
    kind = ("chat.completion.chunk" if chunk else "chat.completion") if chat else "text_completion"
    return {"id": "chatcmpl-1", "object": kind, "created": 0, "model": model, "choices": choices}


def event(model: str, choice: dict[str, Any], chat: bool) -> bytes:
    return f"data: {packed(v1(model, [choice], chat, chunk=True))}\n\n".encode()
