"""Keeps devices, grants and endpoints of this node's record current, without publishing tiny changes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import replace

from sollold.agent.grants import GrantManager
from sollold.cluster.gossip.record import Backend, Endpoint
from sollold.cluster.net.view import View
from sollold.engines.llamacpp.deployment import Deployment
from sollold.machine.device import Device
from sollold.retry import LogAndRetry
from sollold.settings.schema import MIB

log = logging.getLogger("sollold.agent")

PUBLISH_SECONDS = 0.25
"""Minimum interval between changes of the record, in seconds."""
IDLE_SECONDS = 15.0
"""Maximum age of the idle times in the record, in seconds."""
SMALL_SECONDS = 30.0
"""Maximum age of free memory in the record, in seconds, while it is off by a moderate amount."""
_FREE_STEP = 32 * MIB
_FINE, _COARSE = 200, 50
"""Thresholds as fractions of a device's memory, 1/200 and 1/50. Smaller changes than the first are ignored,
larger ones than the second published at once."""


class RecordPublisher:
    """Updates the record whenever ``changed`` is set, and periodically for the deployments' idle times."""

    def __init__(
        self, view: View, grants: GrantManager, deployments: Mapping[str, Deployment], changed: asyncio.Event
    ) -> None:
        """``deployments``: those whose head is this node, by id; a live mapping."""
        self._view = view
        self._grants = grants
        self._deployments = deployments
        self._changed = changed
        self._idle_at = float("-inf")
        self._exact_at = float("-inf")
        """When the devices were last published exactly."""

    async def run(self) -> None:
        """Publish soon after every change, and periodically what changes by itself, until cancelled."""
        retrying = LogAndRetry("the publishing of the record", log)
        while True:
            try:
                async with asyncio.timeout(IDLE_SECONDS):
                    await self._changed.wait()
            except TimeoutError:
                if not self._deployments:
                    continue
            with retrying:
                self.publish()
            await asyncio.sleep(PUBLISH_SECONDS)

    def note_deployment(self) -> None:
        """Publish a deployment's new state at once: a client may list the models right after its answer."""
        published = {
            entry.id: entry.state for entry in self._view.me.endpoints if entry.backend is not Backend.OLLAMA
        }
        if published != {deployment.id: deployment.state for deployment in self._deployments.values()}:
            self.publish()
        else:
            self._changed.set()

    def publish_exactly(self) -> None:
        """Publish now, with a finer threshold for free memory: a plan was based on outdated values."""
        self._exact_at = float("-inf")
        self.publish()

    def publish(self) -> None:
        """Write this node's grants, deployments and devices to its record."""
        self._changed.clear()
        me = self._view.me
        own = [deployment.endpoint() for deployment in self._deployments.values()]
        published = [entry for entry in me.endpoints if entry.backend is not Backend.OLLAMA]
        now = time.monotonic()
        if now - self._idle_at < IDLE_SECONDS and [_without_times(entry) for entry in own] == [
            _without_times(entry) for entry in published
        ]:
            own = published
        else:
            self._idle_at = now
        part = _FINE if now - self._exact_at >= SMALL_SECONDS else _COARSE
        devices = _ignore_small_changes(me.devices, self._grants.ledger.devices(), part)
        if devices != me.devices:
            self._exact_at = now
        self._view.update_me(
            devices=devices,
            grants=self._grants.ledger.grants(),
            cached=self._grants.workers.cached,
            plain=self._grants.external.listed(),
            endpoints=(*(entry for entry in me.endpoints if entry.backend is Backend.OLLAMA), *own),
        )


def _without_times(endpoint: Endpoint) -> Endpoint:
    """Return the endpoint without its idle and expiry times, which change all the time."""
    return replace(endpoint, idle=0.0, expires=0.0)


def _ignore_small_changes(
    published: tuple[Device, ...], now: tuple[Device, ...], part: int
) -> tuple[Device, ...]:
    """Return ``now``, but a device as ``published`` if only its free memory moved by less than 1/``part``."""
    known = {device.id: device for device in published}

    def small(old: Device, new: Device) -> bool:
        step = max(_FREE_STEP, new.total // part)
        return (
            replace(old, free=new.free, available=new.available, barred=new.barred) == new
            and abs(old.free - new.free) < step
            and abs(old.available - new.available) < step
        )

    return tuple(
        old if (old := known.get(device.id)) is not None and small(old, device) else device for device in now
    )
