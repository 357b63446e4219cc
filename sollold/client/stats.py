"""Statistics of a cluster, aggregated from its nodes, for callers with and without an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Self

from sollold.client import background
from sollold.client.coordinator import coordinators_in

_SUMS = (
    "distributed_requests",
    "local_requests",
    "ollama_requests",
    "resumed_streams",
    "generated_tokens",
)


def cluster_stats(cluster: dict[str, Any], nodes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The result of `get_stats`: counters of all nodes since their daemons started, added up.

    ``distributed_requests``, ``local_requests``, ``ollama_requests``: answers by models spread over machines,
    by llama.cpp on one machine, and by an Ollama; ``resumed_streams``: faults that an answer survived;
    ``generated_tokens``; ``tokens_per_second``: over the time in which each engine generated, so the speed of
    a typical single stream; ``coordinator_uptime_seconds``: of the oldest coordinator, 0.0 without one;
    ``active_rpc_backends``: devices that hold layers for a coordinator on another machine; ``nodes``: the
    counters of each node.
    """
    stats: dict[str, Any] = {key: sum(int(node.get(key) or 0) for node in nodes.values()) for key in _SUMS}
    seconds = sum(float(node.get("generating_seconds") or 0.0) for node in nodes.values())
    stats["tokens_per_second"] = round(stats["generated_tokens"] / seconds, 3) if seconds else 0.0
    coordinators = [c for c in coordinators_in(cluster) if c.state == "ready"]
    running = {c.id for c in coordinators}
    stats["coordinator_uptime_seconds"] = max(
        (
            float(deployment.get("uptime_seconds") or 0.0)
            for node in nodes.values()
            for deployment in node.get("deployments") or ()
            if deployment.get("id") in running
        ),
        default=0.0,
    )
    stats["active_rpc_backends"] = len(
        {(backend["host"], backend["device"]) for c in coordinators for backend in c.rpc_backends}
    )
    stats["coordinators"] = len(coordinators)
    stats["nodes"] = nodes
    return stats


class Stats(dict[str, Any]):
    """Statistics that are awaited, or used directly where no event loop runs.

    Args:
        ask: fetches them on the running loop.
        ask_apart: fetches them on another loop.
    """

    def __init__(
        self,
        ask: Callable[[], Coroutine[Any, Any, dict[str, Any]]],
        ask_apart: Callable[[], Coroutine[Any, Any, dict[str, Any]]],
    ) -> None:
        super().__init__()
        self._ask = ask
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self.update(background.run(ask_apart()))

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickle only the numbers: the functions belong to this process.
        return dict, (dict(self),)

    def __missing__(self, key: str) -> Any:
        raise KeyError(key if self else f"{key} (get_stats() is awaited where an event loop runs)")

    def __await__(self) -> Generator[Any, None, Self]:
        self.update((yield from self._ask().__await__()))
        return self
