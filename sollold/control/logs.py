"""Collects the last log lines of a model's engines, from every node that takes part in it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

from sollold.cluster.gossip.record import Backend
from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_client import RpcClient
from sollold.cluster.net.rpc_server import RpcServer
from sollold.cluster.net.view import View, name_of
from sollold.errors import Fault, Refusal
from sollold.facts import dataclass
from sollold.models.names import Resolved

MOST_LINES = 2000
_TAIL_BYTES = 512 * 1024
_CALL_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class LogRequest:
    """Peer method ``logs``: return the last ``lines`` of each engine that a node runs for ``deployment``."""

    deployment: str
    lines: int


@dataclass(frozen=True, slots=True)
class EngineLog:
    """The last log lines of one engine. ``process``: ``llama-server`` or ``worker``."""

    process: str
    text: str


@dataclass(frozen=True, slots=True)
class EngineLogs:
    """The response to `LogRequest`."""

    logs: tuple[EngineLog, ...] = ()


@dataclass(frozen=True, slots=True)
class NodeLog:
    """An engine's last log lines, and the node that it runs on. ``reason``: why they are not available."""

    deployment: str
    node: str
    process: str
    text: str
    reason: str = ""


class LogService:
    """Reads this node's engine logs, and asks other nodes for theirs.

    Args:
        resolve: resolves a model's name, as for any other request.
        folder: the folder of the deployments' logs on this node, with one folder each.
    """

    def __init__(
        self, view: View, calls: RpcClient, resolve: Callable[[str], Resolved], folder: Path
    ) -> None:
        self._view = view
        self._calls = calls
        self._resolve = resolve
        self._folder = folder

    def register(self, server: RpcServer) -> None:
        """Register the peer method ``logs``."""
        server.method("logs", LogRequest, self._on_logs)

    async def tail(self, model: str, lines: int) -> tuple[NodeLog, ...]:
        """Return the last ``lines`` of every engine of ``model`` (a name or a deployment's id).

        For each deployment, the head's come first.

        Raises:
            Refusal: NOT_FOUND, if it is not loaded in an engine of our own.
        """
        # A model whose files are gone can't be resolved, but may still run.
        names = {model.lower(), f"{model.lower()}:latest", self._resolve(model).name.lower()}
        wanted = [
            (endpoint.id, node)
            for record in self._view.live()
            for endpoint in record.endpoints
            if endpoint.backend is not Backend.OLLAMA
            and {endpoint.id.lower(), endpoint.model.lower()} & names
            for node in dict.fromkeys((record.node, *(placed.node for placed in endpoint.placed)))
        ]
        if not wanted:
            raise Refusal(
                Fault.NOT_FOUND,
                f"{model} is not loaded in llama.cpp on any node, so there is no engine log",
            )
        found = await asyncio.gather(*(self._ask(deployment, node, lines) for deployment, node in wanted))
        return tuple(log for logs in found for log in logs)

    async def _ask(self, deployment: str, node: str, lines: int) -> tuple[NodeLog, ...]:
        name = name_of(self._view, node)
        order = LogRequest(deployment, lines)
        try:
            answer = await self._calls.call(node, "logs", order, EngineLogs, timeout=_CALL_SECONDS)
        except PeerError as error:
            return (NodeLog(deployment, name, "", "", str(error)),)
        return tuple(NodeLog(deployment, name, log.process, log.text) for log in answer.logs)

    async def _on_logs(self, caller: str, order: LogRequest) -> EngineLogs:
        lines = max(1, min(order.lines, MOST_LINES))
        return EngineLogs(await asyncio.to_thread(_read, self._folder, order.deployment, lines))


def _read(folder: Path, deployment: str, lines: int) -> tuple[EngineLog, ...]:
    """Return the ends of the log files of one deployment; none if the name is not that of a folder here."""
    if not deployment or Path(deployment).name != deployment:
        return ()
    found = []
    for file in sorted((folder / deployment).glob("*.log")):
        try:
            with file.open("rb") as log:
                log.seek(max(0, os.fstat(log.fileno()).st_size - _TAIL_BYTES))
                text = log.read(_TAIL_BYTES).decode(errors="replace")
        except OSError:
            continue
        found.append(EngineLog(file.stem, "\n".join(text.splitlines()[-lines:])))
    return tuple(found)
