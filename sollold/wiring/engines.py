"""This node's engines for the serving room: the agent's llama-servers and the Ollama beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sollold.agent.agent import Agent
from sollold.agent.ollama import PREFIX, LocalOllama


class EnginesHere:
    """Fulfils `sollold.serving.engines.Engines`. ``ollama`` is None where it is switched off."""

    def __init__(self, agent: Agent, ollama: LocalOllama | None) -> None:
        self._agent = agent
        self._ollama = ollama

    def url(self, endpoint: str) -> str | None:
        """Where the engine listens; None when there is none that answers."""
        if endpoint.startswith(PREFIX):
            return self._ollama.url(endpoint) if self._ollama else None
        try:
            return self._agent.url(endpoint)
        except LookupError:
            return None

    @contextmanager
    def busy(self, endpoint: str, keep_alive: float | None) -> Iterator[None]:
        """While inside, a request is in the line or the engine.

        Raises:
            LookupError: the endpoint is not here, or not ready.
        """
        if endpoint.startswith(PREFIX):
            if self._ollama is None:
                raise LookupError(endpoint)
            with self._ollama.busy(endpoint, keep_alive):
                yield
            return
        with self._agent.busy(endpoint):
            if keep_alive is not None:
                self._agent.keep_alive(endpoint, keep_alive)
            yield

    def fail(self, endpoint: str, reason: str) -> None:
        """The engine hangs, although its process lives."""
        if not endpoint.startswith(PREFIX):
            self._agent.fail(endpoint, reason)
        elif self._ollama:
            self._ollama.fail(endpoint, reason)

    def report(self, endpoint: str, active: int, waiting: int, speed: float) -> None:
        """Counts and speed for the record; a speed of 0.0 leaves the last one."""
        if endpoint.startswith(PREFIX):
            if self._ollama:
                self._ollama.report(endpoint, active, waiting, speed)
            return
        self._agent.counts(endpoint, active, waiting)
        if speed > 0:
            self._agent.speed(endpoint, speed)
