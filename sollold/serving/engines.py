"""The engines on this machine as serving needs them: deployments of llama.cpp, and an Ollama."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sollold.agent.deployments import Deployments
from sollold.cluster.gossip.record import OLLAMA_PREFIX, Endpoint
from sollold.engines.address import EngineAddress
from sollold.engines.llamacpp.deployment import Work
from sollold.engines.ollama.service import LocalOllama


class Engines:
    """This node's engines, by the ids of its endpoints: the deployments whose head it is, and its Ollama.

    Nothing here waits.
    """

    def __init__(self, deployments: Deployments, ollama: LocalOllama) -> None:
        self._deployments = deployments
        self._ollama = ollama

    def endpoint(self, endpoint: str) -> Endpoint | None:
        """What is true of it now; the node's record may lag behind by a moment. None: not here."""
        if not _at_ollama(endpoint):
            return self._deployments.endpoint(endpoint)
        return next((one for one in self._ollama.endpoints() if one.id == endpoint), None)

    def address(self, endpoint: str) -> EngineAddress | None:
        """How the engine is reached; None when there is none that answers."""
        if _at_ollama(endpoint):
            return self._ollama.address(endpoint)
        try:
            return self._deployments.address(endpoint)
        except LookupError:
            return None

    @contextmanager
    def busy(self, endpoint: str, keep_alive: float | None) -> Iterator[None]:
        """While inside, a request is in the queue or the engine: the endpoint is not idle.

        ``keep_alive``: seconds of idleness that the caller wants after it; None: as it was.

        Raises:
            LookupError: it is not here, or not ready.
        """
        if _at_ollama(endpoint):
            with self._ollama.busy(endpoint, keep_alive):
                yield
            return
        with self._deployments.busy(endpoint):
            if keep_alive is not None:
                self._deployments.keep_alive(endpoint, keep_alive)
            yield

    def fail(self, endpoint: str, reason: str) -> None:
        """The engine hangs, although its process runs: end what is left and say so in the record."""
        (self._ollama if _at_ollama(endpoint) else self._deployments).fail(endpoint, reason)

    def work(self, endpoint: str) -> Work | None:
        """What all processes of it have done so far; None where that can't be told."""
        return None if _at_ollama(endpoint) else self._deployments.work(endpoint)

    def report(self, endpoint: str, active: int, waiting: int, speed: float) -> None:
        """Counts for the record; ``speed`` in tokens per second of a single stream, 0.0 when unknown."""
        (self._ollama if _at_ollama(endpoint) else self._deployments).report(endpoint, active, waiting, speed)

    def answered(self, endpoint: str, tokens: int, drafted: int, accepted: int) -> None:
        """A whole answer came from it: of its tokens so many were drafted and accepted."""
        if not _at_ollama(endpoint):
            self._deployments.answered(endpoint, tokens, drafted, accepted)


def _at_ollama(endpoint: str) -> bool:
    return endpoint.startswith(OLLAMA_PREFIX)
