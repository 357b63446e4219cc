"""Gives only the heads of deployments access to this node's workers."""

from __future__ import annotations

from sollold.agent.grants import GrantManager
from sollold.cluster.net.gate import Gate
from sollold.cluster.net.rpc import PeerError

_TRIES = 3


class WorkerAccess:
    """Returns the addresses of workers that no other user of this machine uses.

    Implements `sollold.cluster.net.rpc.Workers`. External workers can't be checked for other clients.
    """

    def __init__(self, node: str, grants: GrantManager) -> None:
        self._node = node
        self._grants = grants

    async def address(self, caller: str, deployment: str, plain: str) -> tuple[str, int]:
        """Return host and port of a worker.

        Raises:
            PeerError: there is none, or ``caller`` may not use it.
        """
        try:
            found = self._grants.worker_address(caller, deployment, plain)
            if plain:
                return found
            for _ in range(_TRIES):
                if await self._grants.used_by_us_alone(deployment):
                    return self._grants.worker_address(caller, deployment)
        except LookupError as error:
            raise PeerError(self._node, str(error), transport=False) from error
        reason = f"other programs on this machine connect to the worker of {deployment}"
        raise PeerError(self._node, reason, transport=False)

    def gate(self, deployment: str) -> Gate | None:
        """Return the filter for the bytes sent to the deployment's own worker, if any."""
        return self._grants.fills.gate(deployment)

    async def connected(self, deployment: str) -> bool:
        """Count a tunnel's connection to the worker; return whether it is the only client."""
        if (worker := self._grants.workers.get(deployment)) is not None:
            worker.connected()
        return await self._grants.used_by_us_alone(deployment)

    async def local_port(self, deployment: str) -> int:
        """Return the worker's port for a ``llama-server`` on this node.

        Raises:
            PeerError: there is no such worker.
        """
        _, port = await self.address(self._node, deployment, "")
        return port
