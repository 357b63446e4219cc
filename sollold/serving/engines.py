"""The engines on this machine as serving needs them: deployments of llama.cpp, and an Ollama."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from sollold.agent.deployments import Deployments
from sollold.cluster.gossip.record import OLLAMA_PREFIX, Endpoint
from sollold.engines.address import EngineAddress
from sollold.engines.llamacpp.deployment import Work
from sollold.engines.ollama.service import LocalOllama


class EngineHost(Protocol):
    """What has endpoints on this node, by their ids. Nothing here waits."""

    def endpoint(self, endpoint: str) -> Endpoint | None:
        """What is true of it now; the node's record may lag behind by a moment. None: not here."""
        ...

    def address(self, endpoint: str) -> EngineAddress | None:
        """How the engine is reached; None when there is none that answers."""
        ...

    def busy(self, endpoint: str, keep_alive: float | None) -> AbstractContextManager[None]:
        """While inside, a request is in the queue or the engine: the endpoint is not idle.

        ``keep_alive``: seconds of idleness that the caller wants after it; None: as it was.

        Raises:
            LookupError: it is not here, or not ready.
        """
        ...

    def fail(self, endpoint: str, reason: str) -> None:
        """The engine hangs, although its process runs: end what is left and say so in the record."""
        ...

    def work(self, endpoint: str) -> Work | None:
        """What all processes of it have done so far; None where that can't be told."""
        ...

    def report(self, endpoint: str, active: int, waiting: int, speed: float) -> None:
        """Counts for the record; ``speed`` in tokens per second of a single stream, 0.0 when unknown."""
        ...

    def answered(self, endpoint: str, tokens: int, drafted: int, accepted: int) -> None:
        """A whole answer came from it: of its tokens so many were drafted and accepted."""
        ...


class Engines:
    """This node's engines: the deployments whose head it is, and its Ollama."""

    def __init__(self, deployments: Deployments, ollama: LocalOllama) -> None:
        self._deployments = deployments
        self._ollama = ollama

    def of(self, endpoint: str) -> EngineHost:
        """Which has the endpoint, if any has."""
        return self._ollama if endpoint.startswith(OLLAMA_PREFIX) else self._deployments
