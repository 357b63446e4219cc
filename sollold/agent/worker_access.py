"""Gives only the heads of deployments access to this node's workers."""

from __future__ import annotations

import logging
from collections.abc import Callable

from sollold.agent.cache_fills import FillGate
from sollold.agent.grants import GrantManager
from sollold.cluster.net.rpc import PeerError
from sollold.engines.llamacpp.ports import LOOPBACK
from sollold.machine.external_worker import external_address, split_address

log = logging.getLogger("sollold.agent")

_TRIES = 3


class WorkerAccess:
    """Returns the addresses of workers that no other user of this machine uses.

    Implements `sollold.cluster.net.rpc.Workers`. External workers can't be checked for other clients.
    """

    def __init__(self, node: str, grants: GrantManager, name: Callable[[str], str]) -> None:
        """``name``: returns a node's display name for its id."""
        self._node = node
        self._grants = grants
        self._name = name

    async def address(self, caller: str, deployment: str, plain: str) -> tuple[str, int]:
        """Return host and port of a worker. ``plain``: address of an external one; empty: this node's own.

        Raises:
            PeerError: there is none, or ``caller`` may not use it.
        """
        found = self._address(caller, deployment, plain)
        if plain:
            return found
        for _ in range(_TRIES):
            if await self._used_by_us_alone(deployment):
                return self._address(caller, deployment)
        raise self._refusal(f"other programs on this machine connect to the worker of {deployment}")

    def gate(self, deployment: str) -> FillGate | None:
        """Return the filter for the bytes sent to the deployment's own worker, if any."""
        return self._grants.fills.gate(deployment)

    async def connected(self, deployment: str) -> bool:
        """Count a tunnel's connection to the worker; return whether it is the only client."""
        if (worker := self._grants.workers.get(deployment)) is not None:
            worker.connected()
        return await self._used_by_us_alone(deployment)

    async def local_port(self, deployment: str) -> int:
        """Return the worker's port for a ``llama-server`` on this node.

        Raises:
            PeerError: there is no such worker.
        """
        _, port = await self.address(self._node, deployment, "")
        return port

    def _address(self, caller: str, deployment: str, external: str = "") -> tuple[str, int]:
        worker = self._grants.workers.get(deployment)
        ledger = self._grants.ledger
        granted = {external_address(device) for device in ledger.bytes_of(deployment)}
        exists = (
            external in granted and self._grants.is_checked(deployment) if external else worker is not None
        )
        if not exists or not ledger.live(deployment):
            raise self._refusal(f"no worker {external or 'runs'} here for deployment {deployment}")
        if caller != ledger.head_of(deployment):
            raise self._refusal(f"{self._name(caller)} is not the head of deployment {deployment}")
        if external:
            return split_address(external)
        assert worker is not None
        return LOOPBACK, worker.port

    async def _used_by_us_alone(self, deployment: str) -> bool:
        """Return whether no other user of this machine uses, or has used, the worker of ``deployment``.

        If one does, the worker is restarted; `_address` then returns its address. Call this only while
        nothing but its head may depend on it.
        """
        worker = self._grants.workers.get(deployment)
        if worker is None or not (foreign_use := await worker.foreign_use()):
            return True
        log.warning(
            "restarting the worker of %s: %s", deployment, foreign_use, extra={"deployment": deployment}
        )
        if self._grants.workers.get(deployment) is worker:
            await self._grants.restart_worker(deployment)
        return False

    def _refusal(self, reason: str) -> PeerError:
        return PeerError(self._node, reason, transport=False)
