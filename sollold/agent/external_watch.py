"""Manages the external workers that this node names: watches them, scans for others, checks versions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from sollold.cluster.net.interfaces import interfaces
from sollold.engines.external.probe import own_protocol
from sollold.engines.external.rpc_protocol import Version
from sollold.engines.external.scan import PORTS, hosts_beside, scan
from sollold.engines.external.workers import ExternalWorkers
from sollold.engines.install.find import Llama
from sollold.engines.llamacpp.child_journal import Journal
from sollold.engines.llamacpp.ports import Ports
from sollold.machine.external_worker import ExternalWorker
from sollold.settings.paths import Places
from sollold.settings.schema import Settings
from sollold.tasks import cancel_and_wait

_LAN_RANK = 1
"""Interfaces of this rank or better lead to the LAN, not to a VPN or containers."""
_PROTOCOL_SECONDS = 30.0
"""Interval of attempts to learn the protocol version from a worker of our own, in seconds."""
_NAMED_SECONDS = 8.0
"""How long to wait for probes of external workers named by a request, in seconds."""


class ExternalWatch:
    """Keeps ``workers`` probed, and scans for others.

    Args:
        llama: returns the llama.cpp in use, if any; external workers must speak its protocol version.
        taken: returns the addresses of workers in use, which must not be probed: the probe would block.
    """

    def __init__(
        self,
        workers: ExternalWorkers,
        settings: Settings,
        places: Places,
        journal: Journal,
        ports: Ports,
        llama: Callable[[], Llama | None],
        taken: Callable[[], frozenset[str]],
    ) -> None:
        self._workers = workers
        self._settings = settings
        self._places = places
        self._journal = journal
        self._ports = ports
        self._llama = llama
        self._taken = taken
        self._watch: asyncio.Task[None] | None = None
        self._scanning: asyncio.Task[tuple[ExternalWorker, ...]] | None = None
        self._protocols: dict[Llama, Version] = {}

    def start(self) -> None:
        """Start watching, if there are any workers."""
        if self._workers and (self._watch is None or self._watch.done()):
            self._watch = asyncio.create_task(self._workers.run(), name="external workers")

    async def name(self, addresses: Sequence[str]) -> tuple[ExternalWorker, ...]:
        """Watch workers named by a request like those of the settings; return what is soon known of them."""
        self._workers.add(addresses)
        self.start()
        llama = self._llama()
        if llama is not None and self._workers.protocol is None:
            version = await self._protocol(llama)
            if version is not None:
                self._workers.use_version(version)
        return await self._workers.settled(addresses, _NAMED_SECONDS)

    async def use_llama(self, llama: Llama) -> None:
        """Learn the protocol version of this llama.cpp, which external workers must speak."""
        while self._workers:
            if (version := await self._protocol(llama)) is not None:
                self._workers.use_version(version)
                return
            await asyncio.sleep(_PROTOCOL_SECONDS)

    async def scan(self) -> tuple[ExternalWorker, ...]:
        """Scan this machine's networks for external workers; takes some seconds."""
        if self._scanning is None or self._scanning.done():
            self._scanning = asyncio.create_task(self._scan(), name="scan")
        return await asyncio.shield(self._scanning)

    async def _scan(self) -> tuple[ExternalWorker, ...]:
        found = await asyncio.to_thread(interfaces, self._settings.cluster.interfaces)
        addresses = [address for nic in found if nic.rank <= _LAN_RANK for address in nic.ipv4]
        llama = self._llama()
        version = await self._protocol(llama) if llama is not None else None
        return await scan(hosts_beside(addresses), PORTS, version, self._taken())

    async def _protocol(self, llama: Llama) -> Version | None:
        if llama not in self._protocols:
            logs = self._places.state / "logs"
            version = await own_protocol(llama, self._ports, self._journal, logs)
            if version is None:
                return None
            self._protocols = {llama: version}
        return self._protocols[llama]

    async def close(self) -> None:
        """Stop watching and scanning."""
        await cancel_and_wait(self._watch, self._scanning)
