"""The way to this node's workers, for their heads and for nobody else."""

from __future__ import annotations

from sollold.agent.grants import GrantManager
from sollold.cluster.net.gate import Gate
from sollold.cluster.net.rpc import PeerError

_TRIES = 3


class WorkerAccess:
    """Gives out the addresses of workers that no other user of this machine uses.

    See `sollold.cluster.net.rpc.Workers`. Workers that others started are what they are.
    """

    def __init__(self, node: str, grants: GrantManager) -> None:
        self._node = node
        self._grants = grants

    async def address(self, caller: str, deployment: str, plain: str) -> tuple[str, int]:
        """Host and port of a worker.

        Raises:
            PeerError: there is none, or not for ``caller``.
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
        """What looks at the bytes for the deployment's own worker, if anything."""
        return self._grants.fills.gate(deployment)

    async def connected(self, deployment: str) -> bool:
        """A tunnel has connected to the worker: whether it is the only client."""
        if (worker := self._grants.workers.get(deployment)) is not None:
            worker.connected()
        return await self._grants.used_by_us_alone(deployment)

    async def local_port(self, deployment: str) -> int:
        """The port of the worker for a ``llama-server`` on this node.

        Raises:
            PeerError: there is none.
        """
        _, port = await self.address(self._node, deployment, "")
        return port
