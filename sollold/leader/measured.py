"""Watches how fast deployments answer, corrects the speed model by it, and keeps that on disk.

Every node does so for itself, from the records: so any of them predicts well, whoever leads next.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from sollold.cluster.record import Backend, Endpoint, Placed, Record, State
from sollold.cluster.view import View
from sollold.leader.library import Library
from sollold.machine.device import Kind
from sollold.models.shape import Shape
from sollold.placement import speed
from sollold.placement.feedback import Factor, Feedback, Term
from sollold.placement.fleet import Link, Spot, joined, links_between, machine_of
from sollold.placement.speed import Correction

log = logging.getLogger("sollold.leader")

SETTLE = 1.0
"""Seconds between two looks at the records: they change with every request."""
SAVE_EVERY = 30.0
NEWS = 0.03
"""Share by which a measured speed must differ to be looked at again."""


class Measured:
    """`start` it, ask `correction`, `close` it at the end.

    Args:
        path: the file in the state folder that keeps the corrections.
    """

    def __init__(self, view: View, library: Library, path: Path) -> None:
        self._view = view
        self._library = library
        self._path = path
        self._feedback = Feedback()
        self._seen: dict[str, float] = {}
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._unsubscribe: Callable[[], None] | None = None
        self._saved: tuple[Factor, ...] = ()

    async def start(self) -> None:
        """Read what is known, and begin to watch."""
        self._saved = await asyncio.to_thread(_read, self._path)
        self._feedback = Feedback(self._saved)
        self._unsubscribe = self._view.subscribe(self._changed.set)
        self._task = asyncio.create_task(self._run(), name="measured speeds")

    async def close(self) -> None:
        """End the watch and write down what is known."""
        if self._unsubscribe is not None:
            self._unsubscribe()
            self._unsubscribe = None
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        await self._save()

    def correction(self, architecture: str) -> Correction:
        """How much slower each device is than predicted, for models of an architecture."""
        return self._feedback.correction(architecture)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        saved = loop.time()
        while True:
            await self._changed.wait()
            self._changed.clear()
            records = self._view.live()
            present = {endpoint.id for record in records for endpoint in record.endpoints}
            self._seen = {key: value for key, value in self._seen.items() if key in present}
            for record in records:
                for endpoint in record.endpoints:
                    if self._is_news(endpoint):
                        await self._learn(record, endpoint, records)
            if loop.time() - saved >= SAVE_EVERY:
                saved = loop.time()
                await self._save()
            await asyncio.sleep(SETTLE)

    def _is_news(self, endpoint: Endpoint) -> bool:
        if endpoint.backend is Backend.OLLAMA or endpoint.state is not State.READY or endpoint.speed <= 0:
            return False
        before = self._seen.get(endpoint.id, 0.0)
        return abs(endpoint.speed - before) > NEWS * before

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
        factors = self._feedback.factors()
        if factors == self._saved:
            return
        try:
            await asyncio.to_thread(_write, self._path, factors)
        except OSError as error:
            log.warning("can't keep the measured speeds in %s: %s", self._path, error.strerror or error)
        else:
            self._saved = factors


def terms_of(
    record: Record, endpoint: Endpoint, records: tuple[Record, ...], shape: Shape
) -> tuple[Term, ...]:
    """What the time per token of a deployment would be made of, without corrections; empty: not known."""
    active = [*(layer.active for layer in shape.layers), shape.output]
    machines = [machine_of(one, holds=False, spare=0.0) for one in records]
    head = next((machine for machine in machines if machine.node == record.node), None)
    if head is None or not endpoint.placed or endpoint.cpu_moe:
        # What two devices share of a layer can't be told apart.
        return ()
    links = links_between(machines, head)
    spots = {(spot.node, spot.device): spot for machine in machines for spot in machine.spots}
    terms: list[Term] = []
    for index, placed in enumerate(endpoint.placed):
        if placed.last <= placed.first:
            continue
        spot = spots.get((placed.node, placed.device))
        if spot is None or placed.last > len(active):
            return ()
        seconds = sum(active[placed.first : placed.last]) * speed.seconds_per_byte(spot)
        terms.append(Term(placed.node, placed.device, seconds))
        link = _link(index, placed, record.node, spot, links)
        if link is not None:
            hop = speed.hop_seconds(link, shape.n_embd)
            if placed.last == len(active):
                hop += speed.logits_seconds(link, shape.n_vocab)
            terms.append(Term(placed.node, speed.HOP, hop))
    return tuple(terms)


def _link(index: int, placed: Placed, head: str, spot: Spot, links: dict[str, Link]) -> Link | None:
    """The way to a device behind a worker; the first of all is the head's own processor."""
    way = links.get(placed.node, Link()) if placed.node != head else None
    if spot.kind is Kind.PLAIN:
        return joined(way, Link())
    if way is not None:
        return way
    if spot.kind is Kind.CPU and index > 0:
        return speed.LOOPBACK
    return None


def _read(path: Path) -> tuple[Factor, ...]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=tuple[Factor, ...])
    except FileNotFoundError:
        return ()
    except (OSError, msgspec.MsgspecError) as error:
        log.warning("the measured speeds in %s can't be read and are begun anew: %s", path, error)
        return ()


def _write(path: Path, factors: tuple[Factor, ...]) -> None:
    """Whole or not at all."""
    beside = path.with_name(path.name + ".new")
    try:
        with beside.open("wb") as file:
            file.write(msgspec.json.encode(factors))
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise
