"""What serving needs of the engines on this machine, and how the agent's two kinds fulfil it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from sollold.agent.agent import Agent
from sollold.agent.deployment import Work
from sollold.agent.ollama import LocalOllama
from sollold.cluster.record import Endpoint


class Engines(Protocol):
    """This node's engines, by the ids of its endpoints. Nothing here waits."""

    def endpoint(self, endpoint: str) -> Endpoint | None:
        """What is true of it now; the node's record may lag behind by a moment. None: not here."""
        ...

    def url(self, endpoint: str) -> str | None:
        """Where the engine listens (``http://127.0.0.1:18080``); None when there is none that answers."""
        ...

    def busy(self, endpoint: str, keep_alive: float | None) -> AbstractContextManager[None]:
        """While inside, a request is in the line or the engine: the endpoint is not idle.

        ``keep_alive``: seconds of idleness that the caller wants after it; None: as it was.

        Raises:
            LookupError: it is not here, or not ready.
        """
        ...

    def fail(self, endpoint: str, reason: str) -> None:
        """The engine hangs, although its process lives: end what is left and say so in the record."""
        ...

    def work(self, endpoint: str) -> Work | None:
        """What all processes of it have done so far; None where that can't be told."""
        ...

    def report(self, endpoint: str, active: int, waiting: int, speed: float) -> None:
        """Counts for the record; ``speed`` in tokens per second of a single stream, 0.0 when unknown."""
        ...


class NodeEngines:
    """`Engines` of a node: the deployments whose head it is, and its Ollama."""

    def __init__(self, agent: Agent, ollama: LocalOllama) -> None:
        self._agent = agent
        self._ollama = ollama

    def endpoint(self, endpoint: str) -> Endpoint | None:
        """As `Engines.endpoint`."""
        if not _at_ollama(endpoint):
            return self._agent.deployment(endpoint)
        return next((one for one in self._ollama.endpoints() if one.id == endpoint), None)

    def url(self, endpoint: str) -> str | None:
        """As `Engines.url`."""
        if _at_ollama(endpoint):
            return self._ollama.url(endpoint)
        try:
            return self._agent.url(endpoint)
        except LookupError:
            return None

    @contextmanager
    def busy(self, endpoint: str, keep_alive: float | None) -> Iterator[None]:
        """As `Engines.busy`."""
        if _at_ollama(endpoint):
            with self._ollama.busy(endpoint, keep_alive):
                yield
            return
        with self._agent.busy(endpoint):
            if keep_alive is not None:
                self._agent.keep_alive(endpoint, keep_alive)
            yield

    def fail(self, endpoint: str, reason: str) -> None:
        """As `Engines.fail`."""
        (self._ollama if _at_ollama(endpoint) else self._agent).fail(endpoint, reason)

    def work(self, endpoint: str) -> Work | None:
        """As `Engines.work`."""
        return None if _at_ollama(endpoint) else self._agent.work(endpoint)

    def report(self, endpoint: str, active: int, waiting: int, speed: float) -> None:
        """As `Engines.report`."""
        if _at_ollama(endpoint):
            self._ollama.report(endpoint, active, waiting, speed)
            return
        self._agent.counts(endpoint, active, waiting)
        if speed > 0:
            self._agent.speed(endpoint, speed)


def _at_ollama(endpoint: str) -> bool:
    return endpoint.startswith("ollama:")
