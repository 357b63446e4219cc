"""Asking a model for text, as `OllamaPool` and `HybridRouter` both do it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Literal, overload

from sollold.client.arguments import check_seconds
from sollold.client.bodies import request_body

Record = dict[str, Any]


class Generation(ABC):
    """`generate`, and how the answer to a body is asked for."""

    @abstractmethod
    def _placement(self, model: str, more: dict[str, Any]) -> Mapping[str, Any] | None:
        """What a load for the request is asked for; arguments in ``more`` that are for it are taken out."""

    @abstractmethod
    async def _records(
        self, path: str, body: Record, whole: bool, timeout: float | None
    ) -> AsyncGenerator[Record, None]:
        """The records of the answer, or a single one with all of it."""

    @overload
    async def generate(
        self, model: str, prompt: str, *, stream: Literal[True], **more: Any
    ) -> AsyncGenerator[Record, None]: ...
    @overload
    async def generate(
        self, model: str, prompt: str, *, stream: Literal[False] = False, **more: Any
    ) -> Record: ...
    async def generate(
        self,
        model: str,
        prompt: str,
        *,
        stream: bool = False,
        priority: int | str | None = None,
        max_tokens: int | None = None,
        timeout: float | None = None,
        **more: Any,
    ) -> Record | AsyncGenerator[Record, None]:
        """Let a model go on from a prompt. Arguments and errors are those of a chat."""
        body = self._body(model, priority, max_tokens, more, prompt=prompt)
        return await self._answer("/api/generate", body, stream, timeout)

    def _body(
        self,
        model: str,
        priority: int | str | None,
        max_tokens: int | None,
        more: dict[str, Any],
        **fields: Any,
    ) -> Record:
        placement = self._placement(model, more)
        return request_body(
            model, priority=priority, max_tokens=max_tokens, placement=placement, more=more, **fields
        )

    async def _answer(
        self, path: str, body: Record, stream: bool, timeout: float | None
    ) -> Record | AsyncGenerator[Record, None]:
        """The answer to a body for ``/api/chat`` or ``/api/generate``."""
        check_seconds("timeout", timeout)
        records = await self._records(path, body, not stream, timeout)
        if stream:
            return records
        try:
            return await anext(records)
        finally:
            await records.aclose()
