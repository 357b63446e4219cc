"""Returns a tool call that llama-server can't parse as text, rather than as an error."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import msgspec

from sollold.api.engine.retry import end_of, ending, with_llama_body
from sollold.cluster.net.pour import pushed
from sollold.errors import Fault, Refusal
from sollold.serving.engine_error import is_unparsed
from sollold.serving.request import Answer, Ask, Engine, Service, Waiting
from sollold.undecodable import UNDECODABLE

_END = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
_HEAD = ("id", "object", "created", "model")
"""Fields that all chunks of a chat have in common."""


class ToolTextService:
    """A `Service` that retries once without tool calls; a stream that has begun ends after its last event."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def open(self, ask: Ask, on_wait: Callable[[Waiting], None]) -> Coroutine[Any, Any, Answer]:
        """As `Service.open`; requests without tools are passed on."""
        call = ask.calls.get(Engine.LLAMA)
        if call is None or not call.body.get("tools"):
            return self.service.open(ask, on_wait)
        return self._open_with_tools(ask, on_wait)

    async def _open_with_tools(self, ask: Ask, on_wait: Callable[[Waiting], None]) -> Answer:
        end = end_of(ask)
        try:
            answer = await self.service.open(ask, on_wait)
        except Refusal as refusal:
            if not _is_unparsed(refusal):
                raise
            uncalled = with_llama_body(ask, {"tool_choice": "none"})
            return await self.service.open(ending(uncalled, end), on_wait)
        if answer.routing.engine is Engine.LLAMA and ask.stream:
            return Answer(answer.routing, pushed(_end_cleanly(answer.batches)), answer.close)
        return answer


async def _end_cleanly(batches: AsyncIterator[list[bytes]]) -> AsyncIterator[list[bytes]]:
    last = b""
    try:
        async for batch in batches:
            last = next(filter(None, reversed(batch)), b"")
            yield batch
    except Refusal as refusal:
        if not last or not _is_unparsed(refusal):
            raise
        yield [_end_after(last)]


def _end_after(raw: bytes) -> bytes:
    """Return the last chunk of a chat after the chunk ``raw``."""
    try:
        chunk = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
    except UNDECODABLE:
        chunk = {}
    return msgspec.json.encode({**{name: chunk[name] for name in _HEAD if name in chunk}, **_END})


def _is_unparsed(refusal: Refusal) -> bool:
    return refusal.fault is Fault.ENGINE and is_unparsed(refusal.message)
