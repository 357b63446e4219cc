"""External workers named by settings or requests: probed periodically and offered as devices.

They belong to the node that names them, so its ledger grants their memory. A worker serves one deployment at
a time and is not probed meanwhile, since it would not answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, replace

from sollold.engines.external.probe import ProbeResult, look
from sollold.engines.external.rpc_protocol import Version
from sollold.facts import dataclass
from sollold.machine.device import Device, Kind
from sollold.machine.external_worker import ExternalDevice, ExternalState, ExternalWorker, split_address
from sollold.retry import LogAndRetry
from sollold.turns import sleep_until_set

log = logging.getLogger("sollold.engines")

_INTERVAL = 1.0
"""Interval of the watch loop, in seconds."""
_PAUSES = {
    ExternalState.USABLE: 60.0,
    ExternalState.DEAD: 20.0,
    ExternalState.BUSY: 60.0,
    ExternalState.REFUSED: 120.0,
}
"""Seconds until the next probe, by the result of the last one."""
NAMED_SECONDS = 900.0
"""How long a worker named by a request is watched after the last such request, in seconds."""
MOST_NAMED = 32
"""Maximum number of workers named by requests, in addition to those of the settings."""
_MAX_PAUSE = 600.0
"""Maximum interval between probes, in seconds: each probe of a busy worker occupies its accept queue."""


@dataclass(slots=True)
class _Watched:
    worker: ExternalWorker
    host: str = ""
    port: int = 0
    devices: tuple[Device, ...] = ()
    due: float = 0.0
    pause: float = 0.0
    probing: asyncio.Lock = field(default_factory=asyncio.Lock)
    until: float = float("inf")
    """Loop time at which the watch ends; infinite for workers named in the settings."""


class ExternalWorkers:
    """Watches external workers in `run`. Only `settled` and `check` wait.

    Args:
        addresses: ``host:port`` of each worker.
        allowed: whether the settings permit their use.
        limits: device → maximum bytes.
        taken: returns the addresses in use by deployments.
        changed: called on the loop when the offered devices or the known states change.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        allowed: bool,
        limits: Mapping[str, int],
        taken: Callable[[], frozenset[str]],
        changed: Callable[[], None],
    ) -> None:
        self._allowed = allowed
        self._limits = limits
        self._taken = taken
        self._changed = changed
        self._local: Version | None = None
        self._watched: dict[str, _Watched] = {}
        self._news = asyncio.Event()
        for address in dict.fromkeys(addresses):
            self._add(address)

    def _add(self, address: str) -> _Watched:
        worker = ExternalWorker(address, ExternalState.CHECKING, "not checked yet")
        watch = self._watched[address] = _Watched(worker)
        try:
            watch.host, watch.port = split_address(address)
        except ValueError as error:
            watch.worker = replace(worker, state=ExternalState.REFUSED, reason=f"{error}: see rpc_backends")
            watch.due = float("inf")
        return watch

    def add(self, addresses: Sequence[str]) -> None:
        """Watch workers named by a request for `NAMED_SECONDS`. Those beyond `MOST_NAMED` are ignored."""
        now = asyncio.get_running_loop().time()
        for address in addresses:
            watch = self._watched.get(address)
            named = sum(entry.until < float("inf") for entry in self._watched.values())
            if watch is None and named < MOST_NAMED:
                watch = self._add(address)
                watch.until = now
            if watch is not None and watch.until < float("inf"):
                watch.until = now + NAMED_SECONDS

    async def settled(self, addresses: Sequence[str], limit: float) -> tuple[ExternalWorker, ...]:
        """Wait up to ``limit`` seconds until each of these has been probed; return what is known of them."""
        loop = asyncio.get_running_loop()
        end = loop.time() + limit
        while loop.time() < end and any(self._checking(address) for address in addresses):
            self._news.clear()
            await sleep_until_set(self._news, max(0.0, end - loop.time()))
        left_out = f"requests have named {MOST_NAMED} workers already, the maximum"
        return tuple(
            self._watched[address].worker
            if address in self._watched
            else ExternalWorker(address, ExternalState.REFUSED, left_out)
            for address in addresses
        )

    def _checking(self, address: str) -> bool:
        watch = self._watched.get(address)
        return watch is not None and watch.worker.state is ExternalState.CHECKING

    def _forget_unnamed(self, now: float, taken: frozenset[str]) -> None:
        gone = [
            address for address, watch in self._watched.items() if now >= watch.until and address not in taken
        ]
        for address in gone:
            del self._watched[address]
        if gone:
            self._changed()

    def __bool__(self) -> bool:
        return bool(self._watched)

    @property
    def protocol(self) -> Version | None:
        """Protocol version of the local llama.cpp; None while unknown."""
        return self._local

    def use_version(self, version: Version) -> None:
        """Set the protocol version of the local llama.cpp, which enables probing."""
        self._local = version
        for watch in self._watched.values():
            watch.due = min(watch.due, 0.0) if watch.host else watch.due

    def listed(self) -> tuple[ExternalWorker, ...]:
        """Return all watched workers, usable or not."""
        return tuple(watch.worker for watch in self._watched.values())

    def devices(self) -> tuple[Device, ...]:
        """Return the devices of the workers that are usable or in use."""
        taken = self._taken()
        return tuple(
            device
            for address, watch in self._watched.items()
            if address in taken or watch.worker.state is ExternalState.USABLE
            for device in watch.devices
        )

    async def run(self) -> None:
        """Watch the workers until cancelled."""
        retrying = LogAndRetry("the watch of external workers", log)
        while self._watched:
            with retrying:
                await self._check_all()
            await asyncio.sleep(_INTERVAL)

    async def _check_all(self) -> None:
        """Update the states of workers that were taken or released, and probe those that are due."""
        taken = self._taken()
        now = asyncio.get_running_loop().time()
        self._forget_unnamed(now, taken)
        for address, watch in self._watched.items():
            if address in taken:
                self._update(watch, replace(watch.worker, state=ExternalState.TAKEN, reason=""))
            elif watch.worker.state is ExternalState.TAKEN:
                # Whether it survived its client is unknown: it is offered again only after a probe.
                reason = "a deployment has just released it"
                self._update(watch, replace(watch.worker, state=ExternalState.CHECKING, reason=reason))
                watch.due = now
        due = [watch for watch in self._watched.values() if now >= watch.due and self._local is not None]
        await asyncio.gather(*(self._probe(watch) for watch in due if watch.worker.address not in taken))

    async def check(self, address: str) -> str:
        """Probe a worker that a deployment is about to use; return why it is unusable, or an empty string."""
        watch = self._watched.get(address)
        if watch is None or not self._allowed or self._local is None:
            return f"{address} is not used by this node"
        async with watch.probing:
            found = await look(watch.host, watch.port, self._local)
        return found.reason

    async def _probe(self, watch: _Watched) -> None:
        async with watch.probing:
            found = await look(watch.host, watch.port, self._local)
        if watch.worker.address in self._taken():
            return  # A deployment has taken it meanwhile, which may be why it did not answer.
        before = watch.worker.state
        state, reason = found.state, found.reason
        if state is ExternalState.DEAD and before is ExternalState.BUSY and found.silent:
            # Its accept queue is full, with our probes among others.
            state, reason = ExternalState.BUSY, watch.worker.reason
        if state is ExternalState.USABLE and not self._allowed:
            state = ExternalState.REFUSED
            reason = (
                "it is neither authenticated nor encrypted: anyone who can reach it can read and change "
                "what it computes; to use it anyway, set llama.allow_plain_workers = true"
            )
        usual = _PAUSES.get(state, _MAX_PAUSE)
        watch.pause = min(watch.pause * 2, _MAX_PAUSE) if state is before is ExternalState.BUSY else usual
        watch.due = asyncio.get_running_loop().time() + watch.pause
        watch.devices = self._offered(watch.worker.address, found) if state is ExternalState.USABLE else ()
        worker = found.worker(watch.worker.address)
        version = worker.version or watch.worker.version
        self._update(watch, replace(worker, state=state, reason=reason, version=version))

    def _offered(self, address: str, found: ProbeResult) -> tuple[Device, ...]:
        devices = []
        for index, memory in enumerate(found.memories):
            id = ExternalDevice(address, index, len(found.memories)).id
            limit = self._limits.get(id, 0)
            devices.append(
                Device(
                    id=id,
                    kind=Kind.EXTERNAL,
                    name="external worker",
                    total=memory.total,
                    free=memory.free,
                    limit=min(memory.total, limit) if limit else memory.total,
                    granted=0,
                    available=0,
                )
            )
        return tuple(devices)

    def _update(self, watch: _Watched, worker: ExternalWorker) -> None:
        if worker != watch.worker:
            if (worker.state, worker.reason) != (watch.worker.state, watch.worker.reason):
                log.info("external worker %s: %s. %s", worker.address, worker.state.value, worker.reason)
            watch.worker = worker
            self._news.set()
            self._changed()
