"""Watches the speed and the drafts of deployments, corrects the speed model, and stores the result.

Every node does this by itself, from the records, so that each can predict well if it leads next.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

from sollold.cluster.gossip.record import Backend, Drafts, Endpoint, Placed, Record, State
from sollold.cluster.net.view import View
from sollold.machine.device import Kind
from sollold.models.footprint.shape import Shape
from sollold.models.library import Library
from sollold.placement import cost_model
from sollold.placement.calibration import Calibration, Factor, TimePart
from sollold.placement.cost_model import Correction
from sollold.placement.inventory import DeviceCapacity, Link, joined, links_between, machine_of
from sollold.placement.speculation import MeasuredDrafts
from sollold.placement.speculation_gain import AcceptanceHistory, Measured
from sollold.retry import LogAndRetry
from sollold.settings.state_file import read_json, save_json
from sollold.tasks import cancel_and_wait
from sollold.turns import next_turn

log = logging.getLogger("sollold.leader")

SETTLE = 1.0
"""Minimum seconds between two passes over the records, which change with every request."""
SAVE_EVERY = 30.0
NEWS = 0.03
"""Fraction by which a measured speed must change to be used again."""
FEW = 32
"""Minimum new tokens of a deployment before its drafts are counted."""


class SpeedCalibration:
    """Learns from measured speeds. Call `start`, then `correction` and `draft_stats`, and finally `close`.

    Args:
        path: file in the state folder for the corrections; ``drafts.json`` beside it is for the drafts.
    """

    def __init__(self, view: View, library: Library, path: Path) -> None:
        self._view = view
        self._library = library
        self._path = path
        self._feedback = Calibration()
        self._seen: dict[str, float] = {}
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._unsubscribe: Callable[[], None] = lambda: None
        self._saved: tuple[Factor, ...] = ()
        self._drafts_path = path.with_name("drafts.json")
        self._acceptance = AcceptanceHistory()
        self._counted: dict[str, Drafts] = {}
        """Draft counts of each deployment that are learnt already."""
        self._saved_drafts: tuple[Measured, ...] = ()

    async def start(self) -> None:
        """Read the stored measurements and start watching."""
        saved = await asyncio.to_thread(read_json, self._path, tuple[Factor, ...])
        self._saved = saved or ()
        self._feedback = Calibration(self._saved)
        drafts = await asyncio.to_thread(read_json, self._drafts_path, tuple[Measured, ...])
        self._saved_drafts = drafts or ()
        self._acceptance = AcceptanceHistory(self._saved_drafts)
        self._unsubscribe = self._view.subscribe(self._changed.set)
        self._task = asyncio.create_task(self._run(), name="measured speeds")

    async def close(self) -> None:
        """Stop watching and store the measurements."""
        self._unsubscribe()
        await cancel_and_wait(self._task)
        await self._save()

    def correction(self, architecture: str) -> Correction:
        """Return the correction of the devices' speeds for models of an architecture."""
        return self._feedback.correction(architecture)

    def draft_stats(self, digest: str) -> MeasuredDrafts:
        """Return the measured drafts for a model."""
        return lambda drafter: self._acceptance.stats(digest, drafter, time.time())

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        saved = loop.time()
        attempt = LogAndRetry("learning from measured speeds", log)
        while True:
            await self._changed.wait()
            self._changed.clear()
            with attempt:
                await self._learn_all()
                if loop.time() - saved >= SAVE_EVERY:
                    saved = loop.time()
                    await self._save()
            await next_turn(SETTLE)

    async def _learn_all(self) -> None:
        records = self._view.live()
        present = {endpoint.id for record in records for endpoint in record.endpoints}
        self._seen = {key: value for key, value in self._seen.items() if key in present}
        self._counted = {key: value for key, value in self._counted.items() if key in present}
        for record in records:
            for endpoint in record.endpoints:
                self._learn_drafts(endpoint)
                if self._has_changed(endpoint):
                    await self._learn(record, endpoint, records)

    def _has_changed(self, endpoint: Endpoint) -> bool:
        if endpoint.backend is Backend.OLLAMA or endpoint.state is not State.READY or endpoint.speed <= 0:
            return False
        if endpoint.drafts.by:
            # With drafts, the devices' speed can't be derived from the deployment's.
            return False
        before = self._seen.get(endpoint.id, 0.0)
        return abs(endpoint.speed - before) > NEWS * before

    def _learn_drafts(self, endpoint: Endpoint) -> None:
        drafts, known = endpoint.drafts, self._counted.get(endpoint.id, Drafts())
        tokens = drafts.tokens - known.tokens
        if not drafts.by or tokens < FEW:
            return
        self._counted[endpoint.id] = drafts
        drafted, accepted = drafts.drafted - known.drafted, drafts.accepted - known.accepted
        drafter = drafts.digest or drafts.by
        self._acceptance.learn(
            Measured(endpoint.digest, drafter, drafts.length, tokens, drafted, accepted, time.time())
        )

    async def _learn(self, record: Record, endpoint: Endpoint, records: tuple[Record, ...]) -> None:
        self._seen[endpoint.id] = endpoint.speed
        holders = [(node, model) for node, model in self._library.find(endpoint.model) if model.files]
        if not holders or holders[0][1].digest != endpoint.digest:
            return
        node, model = next((pair for pair in holders if pair[0] == record.node), holders[0])
        try:
            shape = await self._library.shape(node, model)
        except LookupError as error:
            log.debug("%s", error)
            return
        terms = terms_of(record, endpoint, records, shape)
        if terms:
            self._feedback.measured(shape.architecture, terms, 1 / endpoint.speed)

    async def _save(self) -> None:
        factors, drafts = self._feedback.factors(), self._acceptance.facts()
        if factors != self._saved and await asyncio.to_thread(save_json, self._path, factors):
            self._saved = factors
        if drafts != self._saved_drafts and await asyncio.to_thread(save_json, self._drafts_path, drafts):
            self._saved_drafts = drafts


def terms_of(
    record: Record, endpoint: Endpoint, records: tuple[Record, ...], shape: Shape
) -> tuple[TimePart, ...]:
    """Return the parts of a deployment's uncorrected time per token; empty when unknown."""
    active = [*(layer.active for layer in shape.layers), shape.output]
    machines = [machine_of(member, holds=False, spare=0.0) for member in records]
    head = next((machine for machine in machines if machine.node == record.node), None)
    if head is None or not endpoint.placed or endpoint.cpu_moe:
        # With `cpu_moe`, two devices share a layer, and their times can't be told apart.
        return ()
    links = links_between(machines, head)
    capacities = {
        (capacity.node, capacity.device): capacity for machine in machines for capacity in machine.devices
    }
    terms: list[TimePart] = []
    for index, placed in enumerate(endpoint.placed):
        if placed.last <= placed.first:
            continue
        capacity = capacities.get((placed.node, placed.device))
        if capacity is None or placed.last > len(active):
            return ()
        seconds = sum(active[placed.first : placed.last]) * cost_model.seconds_per_byte(capacity)
        terms.append(TimePart(placed.node, placed.device, seconds))
        link = _link(index, placed, record.node, capacity, links)
        if link is not None:
            hop = cost_model.hop_seconds(link, shape.n_embd)
            if placed.last == len(active):
                hop += cost_model.logits_seconds(link, shape.n_vocab)
            terms.append(TimePart(placed.node, cost_model.HOP, hop))
    return tuple(terms)


def _link(
    index: int, placed: Placed, head: str, capacity: DeviceCapacity, links: dict[str, Link]
) -> Link | None:
    """Return the link to a device behind a worker, else None; index 0 is the head's own processor."""
    link = links.get(placed.node, Link()) if placed.node != head else None
    if capacity.kind is Kind.EXTERNAL:
        return joined(link, Link())
    if link is not None:
        return link
    if capacity.kind is Kind.CPU and index > 0:
        return cost_model.LOOPBACK
    return None
