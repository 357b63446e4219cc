"""Calls between nodes. One TLS port (11436) serves all protocols, selected by ALPN.

``sollold-http``: peer calls and streams (HTTP/1.1 in TLS, both sides proved members).
``sollold-tunnel``: layers for a worker.  ``sollold-link``: the standing link that reveals a death within a
second.  ``sollold-sync``: push-pull of full states.  ``sollold-join``, ``sollold-invited``: admission.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

from sollold.cluster.net.gate import Gate

T = TypeVar("T")


class PeerError(Exception):
    """A peer could not be reached, refused, or disconnected. ``transport``: certainly nothing was done."""

    def __init__(self, node: str, message: str, *, transport: bool) -> None:
        super().__init__(message)
        self.node = node
        self.transport = transport


class Workers(Protocol):
    """A node's workers, as targets of tunnels."""

    async def address(self, caller: str, deployment: str, plain: str) -> tuple[str, int]:
        """Return host and port of a worker for ``caller``, which is authenticated by TLS.

        ``plain``: the address of an external worker; empty: the one started for the deployment.

        Raises:
            PeerError: there is none, or the caller may not use it.
        """
        ...

    def gate(self, deployment: str) -> Gate | None:
        """Return the gate for the deployment's own worker, if it has one."""
        ...

    async def connected(self, deployment: str) -> bool:
        """Note that a tunnel connected to the deployment's own worker. Returns whether it is the only client.

        If not, the worker was restarted, and its address must be requested again.
        """
        ...
