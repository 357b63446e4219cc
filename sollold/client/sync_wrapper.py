"""Blocking versions of `HybridRouter` and `OllamaPool`.

Their requests run on an event loop in a background thread, so they may be called from several threads, and
within a running event loop (which they block, as any blocking call does).
"""

from __future__ import annotations

import atexit
import contextlib
import weakref
from collections.abc import Generator, Iterable
from dataclasses import replace
from typing import Any, Literal, Self, Unpack, overload

from sollold.client import hybrid_router, pool
from sollold.client.background import iterate, run
from sollold.client.coordinator import Coordinator, coordinators_in
from sollold.client.errors import ClientError
from sollold.client.generation import Record
from sollold.client.node_list import NodeList
from sollold.client.pool import NodeNames, Records, Vectors
from sollold.client.request_arguments import ChatArguments, EmbedArguments, GenerateArguments, Messages
from sollold.client.router_options import RouterOptions

__all__ = ["HybridRouter", "OllamaPool"]


class _Blocking:
    """Shared by both: the context manager, generation and embeddings."""

    asynchronous: pool.OllamaPool | hybrid_router.HybridRouter
    _nodes: NodeList

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return self._nodes.asked_by(self)

    def close(self) -> None:
        """Close the connections, and stop the daemon if a router started one."""
        run(self.asynchronous.close())

    @overload
    def generate(
        self, model: str, prompt: str, *, stream: Literal[True], **more: Unpack[GenerateArguments]
    ) -> Generator[Record, None, None]: ...
    @overload
    def generate(
        self, model: str, prompt: str, *, stream: Literal[False] = False, **more: Unpack[GenerateArguments]
    ) -> Record: ...
    @overload
    def generate(
        self, model: str, prompt: str, *, stream: bool, **more: Unpack[GenerateArguments]
    ) -> Record | Generator[Record, None, None]: ...
    def generate(
        self,
        model: str,
        prompt: str,
        *,
        stream: bool = False,
        priority: int | str | None = None,
        max_tokens: int | None = None,
        timeout: float | None = None,
        **more: Any,
    ) -> Record | Generator[Record, None, None]:
        """Generate text from a prompt: return Ollama's response, or with ``stream`` an iterator of records.

        Arguments and errors as for `sollold.client.OllamaPool.generate`.
        """
        more |= {"priority": priority, "max_tokens": max_tokens, "timeout": timeout}
        if stream:
            return iterate(run(self.asynchronous.generate(model, prompt, stream=True, **more)))
        answer: Record = run(self.asynchronous.generate(model, prompt, stream=False, **more))
        return answer

    def embed(
        self,
        model: str,
        input: str | Iterable[str],
        *,
        priority: int | str | None = None,
        timeout: float | None = None,
        **more: Unpack[EmbedArguments],
    ) -> Record:
        """Embed one text or several; see `sollold.client.OllamaPool.embed`."""
        return run(self.asynchronous.embed(model, input, priority=priority, timeout=timeout, **more))

    def batch_embed(
        self,
        model: str,
        inputs: Iterable[str],
        *,
        concurrency: int = 4,
        priority: int | str | None = None,
        timeout: float | None = None,
        **more: Unpack[EmbedArguments],
    ) -> Vectors:
        """Embed many texts, keeping their order; see `sollold.client.OllamaPool.batch_embed`."""
        return run(
            self.asynchronous.batch_embed(
                model, inputs, concurrency=concurrency, priority=priority, timeout=timeout, **more
            )
        )

    def get_stats(self) -> Record:
        """What the daemons have counted since their start; see `sollold.client.stats.cluster_stats`."""

        async def ask() -> Record:
            return await self.asynchronous.get_stats()

        return run(ask())


class OllamaPool(_Blocking):
    """The cluster as a pool of Ollamas; arguments as for `sollold.client.OllamaPool`."""

    def __init__(
        self, nodes: NodeNames | None = None, *, timeout: float = 30.0, api_key: str | None = None
    ) -> None:
        self.asynchronous: pool.OllamaPool = pool.OllamaPool(nodes, timeout=timeout, api_key=api_key)
        self._nodes = self.asynchronous.client.nodes

    @classmethod
    def auto_configure(
        cls, nodes: NodeNames | None = None, *, timeout: float = 30.0, api_key: str | None = None
    ) -> Self:
        """A pool of the nodes found automatically with the first request."""
        return cls(nodes, timeout=timeout, api_key=api_key)

    @overload
    def chat(
        self, model: str, messages: Messages, *, stream: Literal[True], **more: Unpack[ChatArguments]
    ) -> Generator[Record, None, None]: ...
    @overload
    def chat(
        self, model: str, messages: Messages, *, stream: Literal[False] = False, **more: Unpack[ChatArguments]
    ) -> Record: ...
    @overload
    def chat(
        self, model: str, messages: Messages, *, stream: bool, **more: Unpack[ChatArguments]
    ) -> Record | Generator[Record, None, None]: ...
    def chat(
        self,
        model: str,
        messages: Messages,
        *,
        stream: bool = False,
        priority: int | str | None = None,
        max_tokens: int | None = None,
        timeout: float | None = None,
        **more: Any,
    ) -> Record | Generator[Record, None, None]:
        """Chat with a model: return Ollama's response with ``_routing``, or with ``stream`` an iterator.

        Arguments and errors as for `sollold.client.OllamaPool.chat`.
        """
        more |= {"priority": priority, "max_tokens": max_tokens, "timeout": timeout}
        if stream:
            return iterate(run(self.asynchronous.chat(model, messages, stream=True, **more)))
        answer: Record = run(self.asynchronous.chat(model, messages, stream=False, **more))
        return answer

    def list(self) -> Records:
        """The models of the cluster, in Ollama's form."""
        return run(self.asynchronous.list())


class HybridRouter(_Blocking):
    """Routes requests to the cluster; arguments as for `sollold.client.HybridRouter`."""

    def __init__(self, ollama_pool: OllamaPool | None = None, **options: Unpack[RouterOptions]) -> None:
        if not isinstance(ollama_pool, OllamaPool | None):
            raise TypeError(f"ollama_pool must be a {__name__}.OllamaPool, not {ollama_pool!r}")
        self.asynchronous: hybrid_router.HybridRouter = hybrid_router.HybridRouter(
            None if ollama_pool is None else ollama_pool.asynchronous, **options
        )
        self._nodes = self.asynchronous.ollama_pool.client.nodes
        if options.get("auto_setup_rpc"):
            _with_daemons.add(self)

    @overload
    def route_request(
        self, model: str, messages: Messages, *, stream: Literal[True], **more: Unpack[ChatArguments]
    ) -> Generator[Record, None, None]: ...
    @overload
    def route_request(
        self, model: str, messages: Messages, *, stream: Literal[False] = False, **more: Unpack[ChatArguments]
    ) -> Record: ...
    @overload
    def route_request(
        self, model: str, messages: Messages, *, stream: bool, **more: Unpack[ChatArguments]
    ) -> Record | Generator[Record, None, None]: ...
    def route_request(
        self,
        model: str,
        messages: Messages,
        *,
        stream: bool = False,
        priority: int | str | None = None,
        max_tokens: int | None = None,
        timeout: float | None = None,
        **more: Any,
    ) -> Record | Generator[Record, None, None]:
        """Chat with a model: return Ollama's response with ``_routing``, or with ``stream`` an iterator.

        Arguments and errors as for `sollold.client.HybridRouter.route_request`.
        """
        more |= {"priority": priority, "max_tokens": max_tokens, "timeout": timeout}
        if stream:
            return iterate(run(self.asynchronous.route_request(model, messages, stream=True, **more)))
        answer: Record = run(self.asynchronous.route_request(model, messages, stream=False, **more))
        return answer

    def should_use_distributed(self, model: str) -> bool:
        """Whether a request would be answered by several machines, according to the cluster's plan.

        Raises:
            InsufficientMemory: it would not run at all.
            ClientError: the model is unknown, or no daemon was reachable.
        """
        return run(self.asynchronous.should_use_distributed(model))

    def placement(self, model: str) -> Record:
        """Placement wishes for loads caused by this router's requests; empty: the settings decide."""
        return self.asynchronous.placement(model)

    def explain(self, model: str) -> Record:
        """How ``model`` would be answered now; see `sollold.client.HybridRouter.explain`."""
        return run(self.asynchronous.explain(model))

    @property
    def coordinators(self) -> list[Coordinator]:
        """The coordinators of this router's models, queried now; the last used comes first.

        Raises:
            ClientError: no daemon was reachable.
        """
        # A method rather than a local function, since it is pickled with a coordinator.
        return [replace(c, look=self._is_ready) for c in run(self.asynchronous.refresh())]

    def _is_ready(self, deployment: str) -> bool:
        """Whether the cluster has a ready coordinator with this id."""
        with contextlib.suppress(ClientError):
            coordinators = coordinators_in(run(self.asynchronous.ollama_pool.client.get("/api/cluster")))
            return any(c.id == deployment and c.state == "ready" for c in coordinators)
        return False

    @property
    def coordinator(self) -> Coordinator | None:
        """The coordinator of this router's models, queried now, or None.

        Raises:
            ClientError: no daemon was reachable.
        """
        found = self.coordinators
        return found[0] if found else None

    @property
    def coordinator_model(self) -> str | None:
        """The name of the model that `coordinator` runs, or None.

        Raises:
            ClientError: no daemon was reachable.
        """
        found = self.coordinator
        return found.model if found is not None else None


# So that `help` shows the arguments, which both versions share.
OllamaPool.__doc__, HybridRouter.__doc__ = pool.OllamaPool.__doc__, hybrid_router.HybridRouter.__doc__


_with_daemons: weakref.WeakSet[HybridRouter] = weakref.WeakSet()


@atexit.register
def _end_daemons() -> None:
    """End the daemons that routers started, at the latest with the program."""
    for router in tuple(_with_daemons):
        with contextlib.suppress(Exception):
            router.close()
