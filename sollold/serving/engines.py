"""Serving's interface to the engines on this machine: deployments of llama.cpp, and Ollama."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from sollold.agent.deployments import Deployments
from sollold.cluster.gossip.record import OLLAMA_PREFIX, Endpoint
from sollold.engines.address import EngineAddress
from sollold.engines.llamacpp.participants import Work
from sollold.engines.ollama.service import LocalOllama


class EngineHost(Protocol):
    """A provider of endpoints on this node, which have ids. No method blocks."""

    def endpoint(self, endpoint: str) -> Endpoint | None:
        """The endpoint's current state, which the node's record may lag behind; None: not here."""
        ...

    def address(self, endpoint: str) -> EngineAddress | None:
        """The engine's address; None if no engine is ready."""
        ...

    def busy(self, endpoint: str, keep_alive: float | None) -> AbstractContextManager[None]:
        """Return a context in which the endpoint does not count as idle: a request is in its queue or engine.

        ``keep_alive``: seconds to stay loaded when idle afterwards, as requested; None: unchanged.

        Raises:
            LookupError: the endpoint is not here, or not ready.
        """
        ...

    def fail(self, endpoint: str, reason: str) -> None:
        """End an engine that hangs although its process runs, and publish ``reason`` in the record."""
        ...

    def work(self, endpoint: str) -> Work | None:
        """Work counters of all its processes; None if unknown."""
        ...

    def report(self, endpoint: str, active: int, waiting: int, speed: float) -> None:
        """Set the counts for the record; ``speed``: tokens per second of a single stream, 0.0 if unknown."""
        ...

    def answered(self, endpoint: str, tokens: int, drafted: int, accepted: int) -> None:
        """Count the tokens of a complete answer, and its drafted and accepted draft tokens."""
        ...


class Engines:
    """This node's engines: the deployments with this node as head, and its Ollama."""

    def __init__(self, deployments: Deployments, ollama: LocalOllama) -> None:
        self._deployments = deployments
        self._ollama = ollama

    def of(self, endpoint: str) -> EngineHost:
        """The host responsible for this id, whether or not it has such an endpoint."""
        return self._ollama if endpoint.startswith(OLLAMA_PREFIX) else self._deployments
