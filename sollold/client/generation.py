"""Text generation, shared by `OllamaPool` and `HybridRouter`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Literal, Unpack, overload

from sollold.client.arguments import check_seconds
from sollold.client.bodies import request_body
from sollold.client.request_arguments import GenerateArguments

Record = dict[str, Any]


class Generation(ABC):
    """Provides `generate`, and sends request bodies."""

    @abstractmethod
    def _placement(self, model: str) -> Mapping[str, Any] | None:
        """Wishes for a load that the request causes."""

    @abstractmethod
    async def _records(
        self, path: str, body: Record, whole: bool, timeout: float | None
    ) -> AsyncGenerator[Record, None]:
        """The records of the answer, or a single one with the complete answer."""

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
        """Generate text from a prompt: return Ollama's response, or with ``stream`` an iterator of records.

        Args:
            model: name of the model.
            prompt: text to continue.
            stream: return an iterator over the records.
            priority: 1 to 10, or a name such as ``"HIGH"``.
            max_tokens: maximum length of the answer.
            timeout: limit for the whole answer, in seconds; it also stops the engine.
            more: Ollama's options (``temperature``, ``seed`` …, or ``options={…}``) and fields (``system``,
                ``images``, ``format``, ``keep_alive`` …); `GenerateArguments` has them all.

        Raises:
            TimeoutError: after ``timeout``.
            ClientError: the daemon refused, or none was reachable.
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
        """Send a body to ``/api/chat`` or ``/api/generate`` and return the answer."""
        check_seconds("timeout", timeout)
        records = await self._records(path, body, not stream, timeout)
        if stream:
            return records
        try:
            return await anext(records)
        finally:
            await records.aclose()
