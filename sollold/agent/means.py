"""What every deployment of a head uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import aiohttp

from sollold.agent.journal import Journal
from sollold.agent.oracle import Oracle
from sollold.agent.ports import Ports
from sollold.cluster.peer import PeerCalls
from sollold.cluster.pump import Traffic


class Tunnel(Protocol):
    """A loopback port on this node behind which another node's worker is."""

    @property
    def port(self) -> int:
        """What ``--rpc`` is given."""
        ...

    @property
    def traffic(self) -> Traffic:
        """What went through."""
        ...

    async def close(self) -> None:
        """Cut it."""
        ...


class Tunnels(Protocol):
    """Opens tunnels from this node, the head, to workers."""

    async def open(
        self, deployment: str, node: str, on_break: Callable[[str], None], plain: str = ""
    ) -> Tunnel:
        """A tunnel to the worker of ``deployment`` on ``node``; it connects when somebody connects to it.

        ``on_break`` is told why when the way to the worker breaks, or can't be made. ``plain``: the address
        of a worker that others started, which ``node`` names.

        Raises:
            OSError: no loopback port could be had.
        """
        ...


@dataclass(frozen=True, slots=True)
class Means:
    """See the module.

    Attributes:
        node: this node's id.
        http: for asking ``llama-server``.
        logs: the folder of the deployments' logs.
        threads: of an engine; 0: as many as it likes. ``extra``: more words for ``llama-server``.
        local_worker_port: of this node's own worker for a deployment.
    """

    node: str
    calls: PeerCalls
    tunnels: Tunnels
    http: aiohttp.ClientSession
    ports: Ports
    journal: Journal
    logs: Path
    threads: int
    extra: tuple[str, ...]
    local_worker_port: Callable[[str], int]
    oracle: Oracle
