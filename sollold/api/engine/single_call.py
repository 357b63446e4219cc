"""Returns no more than one tool call if the caller disabled parallel calls: llama-server allows more."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from sollold.api.engine.chunks import edit_each
from sollold.cluster.net.pour import pushed
from sollold.serving.request import Answer, Ask, Engine, Service, Waiting


class SingleCallService:
    """A `Service` that leaves out all calls after the first if parallel calls are disabled."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def open(self, ask: Ask, on_wait: Callable[[Waiting], None]) -> Coroutine[Any, Any, Answer]:
        """As `Service.open`."""
        call = ask.calls.get(Engine.LLAMA)
        if call is None or call.body.get("parallel_tool_calls") is not False:
            return self.service.open(ask, on_wait)
        return self._open_single(ask, on_wait)

    async def _open_single(self, ask: Ask, on_wait: Callable[[Waiting], None]) -> Answer:
        answer = await self.service.open(ask, on_wait)
        if answer.routing.engine is not Engine.LLAMA:
            return answer
        return Answer(answer.routing, pushed(_with_first_calls(answer.batches)), answer.close)


async def _with_first_calls(batches: AsyncIterator[list[bytes]]) -> AsyncIterator[list[bytes]]:
    async for batch in batches:
        yield [edit_each(raw, _cut) if b'"tool_calls"' in raw else raw for raw in batch]


def _cut(choice: dict[str, Any]) -> None:
    """Leave out the calls, or the pieces of calls, after the first; changes ``choice``."""
    message = choice.get("delta") or choice.get("message") or {}
    calls = message.pop("tool_calls", None) or ()
    if first := [call for position, call in enumerate(calls) if call.get("index", position) == 0]:
        message["tool_calls"] = first
