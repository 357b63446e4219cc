"""`OllamaPool`: the cluster as a pool of Ollamas; the cluster chooses which machine answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator, Iterable, Mapping
from typing import Any, Literal, Self, Unpack, overload

from sollold.client.arguments import check_count, check_seconds, texts_in
from sollold.client.bodies import checked_messages, request_body
from sollold.client.cluster import ClusterClient
from sollold.client.discovery import urls_of
from sollold.client.errors import NodeSilent, RequestTimeout
from sollold.client.generation import Generation, Record
from sollold.client.request_arguments import ChatArguments, EmbedArguments, Messages
from sollold.client.stats import cluster_stats

NodeNames = str | Mapping[str, object] | Iterable[str | Mapping[str, object]]
Vectors = list[list[float]]
Records = list[Record]

_MAX_EMBED_SECONDS = 600.0
_BATCH_TEXTS = 64
"""Texts per request of a batch."""


class OllamaPool(Generation):
    """The nodes of a cluster. It connects with the first request.

    Args:
        nodes: URLs, ``host:port`` or ``{"host": …, "port": …}`` of nodes, preferred ones first. One is
            enough, since it lists the others. Default: ``$SOLLOLD_NODE_URL``, this machine, else nodes
            found by mDNS.
        timeout: default limit for responses that are not streamed, in seconds.
        api_key: API key, if the nodes require one; None: ``$SOLLOLD_API_KEY``. `ClusterClient` says which
            nodes receive it.
    """

    def __init__(
        self, nodes: NodeNames | None = None, *, timeout: float = 30.0, api_key: str | None = None
    ) -> None:
        self.client = ClusterClient(urls_of(nodes), timeout=timeout, api_key=api_key)

    @classmethod
    def auto_configure(
        cls, nodes: NodeNames | None = None, *, timeout: float = 30.0, api_key: str | None = None
    ) -> Self:
        """A pool of the nodes found automatically. May be awaited, but need not be."""
        return cls(nodes, timeout=timeout, api_key=api_key)

    def __await__(self) -> Generator[Any, None, Self]:
        return self
        yield

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return self.client.nodes.asked_by(self)

    async def close(self) -> None:
        """Close the connections."""
        await self.client.close()

    @overload
    async def chat(
        self, model: str, messages: Messages, *, stream: Literal[True], **more: Unpack[ChatArguments]
    ) -> AsyncGenerator[Record, None]: ...
    @overload
    async def chat(
        self, model: str, messages: Messages, *, stream: Literal[False] = False, **more: Unpack[ChatArguments]
    ) -> Record: ...
    @overload
    async def chat(
        self, model: str, messages: Messages, *, stream: bool, **more: Unpack[ChatArguments]
    ) -> Record | AsyncGenerator[Record, None]: ...
    async def chat(
        self,
        model: str,
        messages: Messages,
        *,
        stream: bool = False,
        priority: int | str | None = None,
        max_tokens: int | None = None,
        timeout: float | None = None,
        **more: Any,
    ) -> Record | AsyncGenerator[Record, None]:
        """Chat with a model: return Ollama's response with ``_routing``, or with ``stream`` an iterator.

        Args:
            model: name of the model.
            messages: the conversation.
            stream: return an iterator over the records.
            priority: 1 to 10, or a name such as ``"HIGH"``.
            max_tokens: maximum length of the answer.
            timeout: limit for the whole answer, in seconds; it also stops the engine.
            more: Ollama's options (``temperature``, ``seed`` …, or ``options={…}``) and fields (``tools``,
                ``format``, ``think``, ``keep_alive`` …).

        Raises:
            TimeoutError: after ``timeout``.
            ClientError: the daemon refused, or none was reachable.
        """
        body = self._body(
            model, priority, max_tokens, more, ChatArguments, messages=checked_messages(messages)
        )
        return await self._answer("/api/chat", body, stream, timeout)

    def _placement(self, model: str) -> None:
        return None

    async def _records(
        self, path: str, body: Record, whole: bool, timeout: float | None
    ) -> AsyncGenerator[Record, None]:
        return self.client.stream(path, body, timeout=timeout, whole=whole)

    async def embed(
        self,
        model: str,
        input: str | Iterable[str],
        *,
        priority: int | str | None = None,
        timeout: float | None = None,
        **more: Unpack[EmbedArguments],
    ) -> Record:
        """Embed one text or several; the vectors are in ``embeddings``.

        Args:
            model: name of the model.
            input: the text or texts.
            priority: 1 to 10, or a name such as ``"HIGH"``.
            timeout: limit for the request, in seconds.
            more: Ollama's fields (``dimensions``, ``truncate``, ``keep_alive``, ``options``).

        Raises:
            TimeoutError: after ``timeout``.
            ClientError: the daemon refused, or none was reachable.
        """
        check_seconds("timeout", timeout)
        body = request_body(
            model,
            priority=priority,
            more=more,
            arguments=EmbedArguments,
            input=input if isinstance(input, str) else texts_in("input", input),
        )
        if timeout is not None:
            body["timeout"] = timeout
        try:
            answer: Record = await self.client.post(
                "/api/embed", body, timeout=_MAX_EMBED_SECONDS if timeout is None else timeout + 1
            )
        except NodeSilent:
            raise RequestTimeout(f"request timeout after {timeout or _MAX_EMBED_SECONDS:g} s") from None
        return answer

    async def batch_embed(
        self,
        model: str,
        inputs: Iterable[str],
        *,
        concurrency: int = 4,
        priority: int | str | None = None,
        timeout: float | None = None,
        **more: Unpack[EmbedArguments],
    ) -> Vectors:
        """Embed many texts, keeping their order.

        Args:
            model: name of the model.
            inputs: the texts.
            concurrency: number of concurrent requests.
            priority, more: as in `embed`, for each request.
            timeout: limit for the whole batch, in seconds.

        Raises:
            TimeoutError: after ``timeout``.
            ClientError: as `embed`.
        """
        check_seconds("timeout", timeout)
        check_count("concurrency", concurrency, "1 is one request after the other")
        texts = texts_in("inputs", inputs)
        slots = asyncio.Semaphore(concurrency)

        async def part(start: int) -> Vectors:
            async with slots:
                batch = texts[start : start + _BATCH_TEXTS]
                answer = await self.embed(model, batch, priority=priority, **more)
                return list(answer["embeddings"])

        try:
            async with asyncio.timeout(timeout):
                async with asyncio.TaskGroup() as group:
                    parts = [group.create_task(part(start)) for start in range(0, len(texts), _BATCH_TEXTS)]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        except TimeoutError:
            raise RequestTimeout(f"request timeout after {timeout:g} s") from None
        return [vector for done in parts for vector in done.result()]

    async def list(self) -> Records:
        """The models of the cluster, in Ollama's form."""
        answer = await self.client.get("/api/tags")
        return answer["models"]  # type: ignore[no-any-return]

    async def get_stats(self) -> Record:
        """Counters of the daemons since their start; see `sollold.client.stats.cluster_stats`."""
        return cluster_stats(
            await self.client.get("/api/cluster"), await self.client.get_all("/api/cluster/stats")
        )
