"""The workers that others started and the settings name: looked at from time to time, offered as devices.

They belong to the node that names them, so its ledger grants their bytes, and a worker is one deployment's
at a time: while one holds it, it is not looked at, for it would not answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from sollold.agent.plain_probe import Look, look
from sollold.agent.rpc_protocol import Version
from sollold.machine.device import Device, Kind
from sollold.machine.plain import PlainDevice, PlainState, PlainWorker, split_address

log = logging.getLogger("sollold.agent")

_BEAT = 1.0
"""Seconds between two looks at who is held and whose turn it is."""
_PAUSES = {PlainState.USABLE: 60.0, PlainState.DEAD: 20.0, PlainState.BUSY: 60.0, PlainState.REFUSED: 120.0}
"""Seconds until the next look."""
_LONGEST = 600.0
"""Each look at a busy worker stands in its line of one, so they become rare."""


@dataclass(slots=True)
class _Watched:
    worker: PlainWorker
    host: str = ""
    port: int = 0
    devices: tuple[Device, ...] = ()
    due: float = 0.0
    pause: float = 0.0
    looking: asyncio.Lock = field(default_factory=asyncio.Lock)


class PlainWorkers:
    """See the module's text. `run` watches; the rest never waits, but `check`.

    Args:
        addresses: ``host:port`` each.
        allowed: whether the settings let them be used.
        limits: device → most bytes.
        held: addresses that a deployment has now.
        changed: called on the loop when what is offered or known has changed.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        allowed: bool,
        limits: Mapping[str, int],
        held: Callable[[], frozenset[str]],
        changed: Callable[[], None],
    ) -> None:
        self._allowed = allowed
        self._limits = limits
        self._held = held
        self._changed = changed
        self._ours: Version | None = None
        self._watched: dict[str, _Watched] = {}
        for address in dict.fromkeys(addresses):
            worker = PlainWorker(address, PlainState.CHECKING, "it has not been looked at yet")
            one = self._watched[address] = _Watched(worker)
            try:
                one.host, one.port = split_address(address)
            except ValueError as error:
                one.worker = replace(worker, state=PlainState.REFUSED, reason=f"{error}: see rpc_backends")
                one.due = float("inf")

    def __bool__(self) -> bool:
        return bool(self._watched)

    def use(self, ours: Version) -> None:
        """The protocol of the llama.cpp here is known: now they can be judged."""
        self._ours = ours
        for one in self._watched.values():
            one.due = min(one.due, 0.0) if one.host else one.due

    def listed(self) -> tuple[PlainWorker, ...]:
        """All that are named, used or not."""
        return tuple(one.worker for one in self._watched.values())

    def devices(self) -> tuple[Device, ...]:
        """What those offer that can be used, or are."""
        held = self._held()
        return tuple(
            device
            for address, one in self._watched.items()
            if address in held or one.worker.state is PlainState.USABLE
            for device in one.devices
        )

    async def run(self) -> None:
        """Watch them, until cancelled."""
        loop = asyncio.get_running_loop()
        while self._watched:
            held = self._held()
            now = loop.time()
            for address, one in self._watched.items():
                if address in held:
                    self._know(one, replace(one.worker, state=PlainState.TAKEN, reason=""))
                elif one.worker.state is PlainState.TAKEN:
                    # Whether it survived its client is not known: it is offered again after a look.
                    reason = "a deployment has just given it back"
                    self._know(one, replace(one.worker, state=PlainState.CHECKING, reason=reason))
                    one.due = now
            due = [one for one in self._watched.values() if now >= one.due and self._ours is not None]
            await asyncio.gather(*(self._look(one) for one in due if one.worker.address not in held))
            await asyncio.sleep(_BEAT)

    async def check(self, address: str) -> str:
        """Look at a worker that a deployment is about to use: why it can't, or empty."""
        one = self._watched.get(address)
        if one is None or not self._allowed or self._ours is None:
            return f"{address} is not used by this node"
        async with one.looking:
            found = await look(one.host, one.port, self._ours)
        return found.reason

    async def _look(self, one: _Watched) -> None:
        async with one.looking:
            found = await look(one.host, one.port, self._ours)
        if one.worker.address in self._held():
            return  # A deployment took it meanwhile: that may be why it did not answer.
        before = one.worker.state
        state, reason = found.state, found.reason
        if state is PlainState.DEAD and before is PlainState.BUSY and found.silent:
            # Its line of one is full, of us as well as others.
            state, reason = PlainState.BUSY, one.worker.reason
        if state is PlainState.USABLE and not self._allowed:
            state = PlainState.REFUSED
            reason = (
                "it is plain: whoever can reach it sees and changes what is computed there; "
                "llama.allow_plain_workers = true allows its use"
            )
        usual = _PAUSES.get(state, _LONGEST)
        one.pause = min(one.pause * 2, _LONGEST) if state is before is PlainState.BUSY else usual
        one.due = asyncio.get_running_loop().time() + one.pause
        one.devices = self._offered(one.worker.address, found) if state is PlainState.USABLE else ()
        worker = found.worker(one.worker.address)
        version = worker.version or one.worker.version
        self._know(one, replace(worker, state=state, reason=reason, version=version))

    def _offered(self, address: str, found: Look) -> tuple[Device, ...]:
        devices = []
        for index, memory in enumerate(found.memories):
            id = PlainDevice(address, index, len(found.memories)).id
            limit = self._limits.get(id, 0)
            devices.append(
                Device(
                    id=id,
                    kind=Kind.PLAIN,
                    name="a worker that others started",
                    total=memory.total,
                    free=memory.free,
                    limit=min(memory.total, limit) if limit else memory.total,
                    granted=0,
                    available=0,
                )
            )
        return tuple(devices)

    def _know(self, one: _Watched, worker: PlainWorker) -> None:
        if worker != one.worker:
            if (worker.state, worker.reason) != (one.worker.state, one.worker.reason):
                log.info("the worker %s: %s. %s", worker.address, worker.state.value, worker.reason)
            one.worker = worker
            self._changed()
