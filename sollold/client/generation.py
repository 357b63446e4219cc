"""Asking a model for text, as `OllamaPool` and `HybridRouter` both do it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Literal, Unpack, overload

from sollold.client.arguments import check_seconds
from sollold.client.bodies import request_body
from sollold.client.request_arguments import GenerateArguments

Record = dict[str, Any]


class Generation(ABC):
    """`generate`, and how the answer to a body is asked for."""

    @abstractmethod
    def _placement(self, model: str) -> Mapping[str, Any] | None:
        """What a load for the request is asked for."""

    @abstractmethod
    async def _records(
        self, path: str, body: Record, whole: bool, timeout: float | None
    ) -> AsyncGenerator[Record, None]:
        """The records of the answer, or a single one with all of it."""

    @overload
    async def generate(
        self, model: str, prompt: str, *, stream: Literal[True], **more: Unpack[GenerateArguments]
    ) -> AsyncGenerator[Record, None]: ...
    @overload
    async def generate(
        self, model: str, prompt: str, *, stream: Literal[False] = False, **more: Unpack[GenerateArguments]
    ) -> Record: ...
    @overload
    async def generate(
        self, model: str, prompt: str, *, stream: bool, **more: Unpack[GenerateArguments]
    ) -> Record | AsyncGenerator[Record, None]: ...
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
        """Let a model go on from a prompt: Ollama's answer; with ``stream`` its records as they come.

        Args:
            model: its name.
            prompt: the text.
            stream: whether to get the records as they come.
            priority: 1 to 10, or a name such as ``"HIGH"``.
            max_tokens: of the answer at most.
            timeout: seconds for the whole answer; the engine is stopped then, too.
            more: Ollama's options (``temperature``, ``seed`` …, or ``options={…}``) and fields (``system``,
                ``images``, ``format``, ``keep_alive`` …); `GenerateArguments` has them all.

        Raises:
            TimeoutError: after ``timeout``.
            ClientError: the daemon refused, or none could be reached.
        """
        body = self._body(model, priority, max_tokens, more, GenerateArguments, prompt=prompt)
        return await self._answer("/api/generate", body, stream, timeout)

    def _body(
        self,
        model: str,
        priority: int | str | None,
        max_tokens: int | None,
        more: Mapping[str, Any],
        arguments: type[Any],
        **fields: Any,
    ) -> Record:
        return request_body(
            model,
            priority=priority,
            max_tokens=max_tokens,
            placement=self._placement(model),
            more=more,
            arguments=arguments,
            **fields,
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
