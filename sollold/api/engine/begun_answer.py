"""Reads the beginning of an answer to determine whether it is a tool call or text."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec

from sollold.cluster.net.pour import pushed
from sollold.serving.request import Answer
from sollold.undecodable import UNDECODABLE


async def begins_with_call(answer: Answer, *, or_thought: bool = False) -> tuple[bool | None, Answer]:
    """Return whether ``answer`` begins with a tool call, and an answer that repeats the batches read from it.

    False: it begins with text, or finished without either; None: its stream ended before that. Thinking is
    skipped, or counts as a call if ``or_thought``.
    """
    prefix: list[list[bytes]] = []
    try:
        calls = await _read(answer.batches, prefix, or_thought)
    except BaseException:
        await answer.end()
        raise
    return calls, Answer(answer.routing, pushed(_joined(prefix, answer.batches)), answer.close)


async def _read(
    batches: AsyncIterator[list[bytes]], prefix: list[list[bytes]], or_thought: bool
) -> bool | None:
    """Read batches into ``prefix`` until it is known whether a call comes first; None if the stream ends."""
    async for batch in batches:
        prefix.append(batch)
        for raw in batch:
            if not raw:
                prefix.clear()
            elif (calls := _is_call(raw, or_thought)) is not None:
                return calls
    return None


def _is_call(raw: bytes, or_thought: bool) -> bool | None:
    """Whether an event shows a call; None: undecided. Events that are not of a chat count as calls."""
    try:
        event = msgspec.json.decode(raw)
        # Ollama's own events are one choice, and have no name for it.
        choices = event["choices"] if "choices" in event else [{**event, "finish_reason": event["done"]}]
        for choice in choices:
            message = choice.get("delta") or choice.get("message") or {}
            if message.get("tool_calls") or (or_thought and message.get("reasoning_content")):
                return True
            if (message.get("content") or "").strip() or choice.get("finish_reason"):
                return False
    except (*UNDECODABLE, KeyError, TypeError, AttributeError):
        return True
    return None


async def _joined(prefix: list[list[bytes]], rest: AsyncIterator[list[bytes]]) -> AsyncIterator[list[bytes]]:
    for batch in prefix:
        yield batch
    async for batch in rest:
        yield batch
