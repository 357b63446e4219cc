"""Calls between nodes. One TLS port (11436) carries them, by ALPN.

``sollold-http``: peer calls and streams (HTTP/1.1 inside TLS, both sides proved members).
``sollold-tunnel``: layers on their way to a worker.  ``sollold-link``: the standing link that tells a
death within a second.  ``sollold-sync``: push-pull of whole states.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

from sollold.cluster.net.gate import Gate

T = TypeVar("T")


class PeerError(Exception):
    """A peer could not be reached, refused, or broke off. ``transport``: nothing was done for sure."""

    def __init__(self, node: str, message: str, *, transport: bool) -> None:
        super().__init__(message)
        self.node = node
        self.transport = transport


class Workers(Protocol):
    """The workers of a node, for the tunnels that lead to them."""

    async def address(self, caller: str, deployment: str, plain: str) -> tuple[str, int]:
        """Host and port of a worker, for ``caller``, which TLS has proved.

        ``plain``: the address of an external worker; empty: the one started for the deployment.

        Raises:
            PeerError: there is none, or not for the caller.
        """
        ...

    def gate(self, deployment: str) -> Gate | None:
        """What looks at the bytes for the deployment's own worker, if anything."""
        ...

    async def connected(self, deployment: str) -> bool:
        """A tunnel has connected to the deployment's own worker: whether it is the only client.

        If not, the worker was started again, and its address is to be asked for anew.
        """
        ...
