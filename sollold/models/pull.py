"""Getting models: from a node, else through an Ollama, else from the hub; told as Ollama tells it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from sollold.cluster.peer import PeerCalls, PeerError
from sollold.cluster.reach import Reach
from sollold.models.arrival import adapters_in, check_items, fault_of
from sollold.models.catalogue import Catalogue
from sollold.models.direct import DirectSource
from sollold.models.fill import BlockingSource, CheckLost, Fill, Source, SourceError
from sollold.models.folders import CARD
from sollold.models.hub import HOSTS, Hub, HubError
from sollold.models.landing import Item, Landing, LandingError, slug
from sollold.models.library import Library
from sollold.models.model import Model
from sollold.models.names import Name, canonical, parse
from sollold.models.pace import Pace
from sollold.models.part_check import PartCheck
from sollold.models.threads import in_thread
from sollold.models.transfer import NodeSource, Parcel

log = logging.getLogger("sollold.models")

Progress = dict[str, Any]
"""A line as Ollama's ``/api/pull`` writes it."""
_BEAT = 0.5
"""Seconds between two lines of progress."""
_CONNECTIONS = 4
_SILENCE = 300.0
"""Seconds without a word after which an Ollama that pulls is given up."""
_CHECKING = 4 * 3600.0
"""The same while it checks what has come: it says nothing then, and reads some hundred gigabytes."""
_THREADS = 16
"""Of all fetches together: more wait for their turn, and nothing else does."""


class PullError(Exception):
    """A model can't be had; the message says why. ``missing``: nobody has it."""

    def __init__(self, message: str, *, missing: bool = False) -> None:
        super().__init__(message)
        self.missing = missing


class _Flight:
    """One fetch under way, watched by any number of callers; it ends with the last of them."""

    def __init__(self) -> None:
        self.nodes_only = True
        """Whether no watcher wants it from anywhere else than nodes."""
        self.lines: dict[str, Progress] = {}
        self.changed = asyncio.Event()
        self.watchers = 0
        self.left = False
        """Whether all watchers have gone, so that it is being ended."""
        self.ended = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    def say(self, status: str, **more: Any) -> None:
        """A line; one of the same digest replaces the one before."""
        self.lines[str(more.get("digest", status))] = {"status": status, **more}
        self.changed.set()


class Puller:
    """Fetches models into our own folder; fulfils `sollold.api.parts.Puller` but for the exception."""

    def __init__(
        self,
        library: Library,
        catalogue: Catalogue,
        calls: PeerCalls,
        node: str,
        pace: Pace,
        ollama_url: Callable[[], str] = lambda: "",
        environ: Mapping[str, str] | None = None,
        reach: Reach | None = None,
    ) -> None:
        """``ollama_url``: where this machine's Ollama listens; empty when there is none.

        ``reach``: bytes from nodes come over sockets of their own; None: over ``calls``, which is slower.
        """
        self._reach = reach
        self._library = library
        self._catalogue = catalogue
        self._calls = calls
        self._node = node
        self._pace = pace
        self._ollama_url = ollama_url
        self._environ = environ
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="fetch")
        self._flights: dict[str, _Flight] = {}
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """End every fetch; what has come is kept."""
        tasks = [flight.task for flight in self._flights.values() if flight.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def pull(self, name: str, *, nodes_only: bool = False) -> AsyncGenerator[Progress, None]:
        """Fetch a model, telling how far it is: ``{status, digest?, total?, completed?}`` … ``success``.

        ``nodes_only``: from other nodes of the cluster, and from nowhere else.

        Leaving the iteration stops the fetch unless another caller waits for it too; asking again goes on
        where it stopped.

        Raises:
            PullError: it can't be had.
        """
        name = self._library.exact(name).asked
        try:
            key = parse(name).key
        except ValueError as error:
            raise PullError(str(error)) from None
        while (flight := self._flights.get(key)) is not None and flight.left:
            # Its threads may still be at work on the files that the next one goes on with.
            await flight.ended.wait()
        # One that has ended is a caller's who reads slowly; what it came to may be true no more.
        if flight is None or flight.task is None or flight.task.done():
            flight = self._flights[key] = _Flight()
            flight.task = asyncio.create_task(self._fly(flight, name), name=f"pull {name}")
            flight.task.add_done_callback(_look_at)
        flight.watchers += 1
        flight.nodes_only = flight.nodes_only and nodes_only
        told: dict[str, Progress] = {}
        try:
            assert flight.task is not None
            while True:
                ended = flight.task.done()
                for id, line in list(flight.lines.items()):
                    if told.get(id) != line:
                        told[id] = line
                        yield line
                if ended:
                    break
                flight.changed.clear()
                waiting = asyncio.ensure_future(flight.changed.wait())
                try:
                    await asyncio.wait(
                        {flight.task, waiting}, timeout=_BEAT, return_when=asyncio.FIRST_COMPLETED
                    )
                finally:
                    waiting.cancel()
            if flight.task.cancelled():
                raise PullError("the node is stopping; pull it again to go on")
            flight.task.result()
        finally:
            flight.watchers -= 1
            if not flight.watchers:
                flight.left = True
                try:
                    if flight.task is not None and not flight.task.done():
                        flight.task.cancel()
                        await asyncio.gather(flight.task, return_exceptions=True)
                finally:
                    flight.ended.set()
                    if self._flights.get(key) is flight:
                        del self._flights[key]

    def holders(self, name: str) -> tuple[tuple[str, Model], ...]:
        """Nodes whose files of the model of just this name can be read."""
        listed = self._library.exact(name).name
        return tuple(
            (node, model)
            for node, model in self._library.holders(listed)
            if model.files and not model.unusable
        )

    async def _fly(self, flight: _Flight, name: str) -> None:
        flight.say("pulling manifest")
        try:
            await self._get(flight, name)
        except (LandingError, SourceError) as error:
            raise PullError(str(error)) from None
        except HubError as error:
            raise PullError(str(error), missing=error.missing) from None
        except OSError as error:
            raise PullError(
                f"it can't be written to {self._catalogue.own}: {error.strerror or error}"
            ) from None
        flight.say("success")

    async def _get(self, flight: _Flight, name: str) -> None:
        parsed = parse(name)
        holders = self.holders(name)
        if any(node == self._node for node, _ in holders):
            return
        on_hub = parsed.host.lower() in HOSTS
        if holders:
            try:
                await self._from_nodes(flight, holders)
                return
            except (PeerError, SourceError) as error:
                log.info("%s can't be had from another node: %s", name, error)
                if flight.nodes_only or (not on_hub and not self._ollama_url()):
                    raise PullError(f"{name}: {error}") from None
        if flight.nodes_only:
            raise PullError(f"no node of the cluster has {name} any more", missing=True)
        if self._ollama_url():
            try:
                await self._through_ollama(flight, name)
                return
            except PullError as error:
                if not on_hub:
                    raise
                log.info("%s can't be had through Ollama: %s; it is fetched from the hub", name, error)
        if on_hub:
            await self._from_hub(flight, parsed)
            return
        near = self._library.exact(name).suggestions
        meant = f"did you mean {' or '.join(near)}? Else " if near else ""
        raise PullError(
            f"no node of the cluster has {canonical(name)}, and there is no Ollama here to fetch it; "
            f"{meant}pull a GGUF model as hf.co/ORG/REPO:QUANTIZATION, or start Ollama",
            missing=True,
        )

    # From nodes

    async def _from_nodes(self, flight: _Flight, holders: tuple[tuple[str, Model], ...]) -> None:
        model = holders[0][1]
        sources: list[Source | BlockingSource] = []
        parcel: Parcel | None = None
        measures: list[str] = []
        fault: PeerError | None = None
        for node, _ in holders:
            source = NodeSource(self._calls, node, model.digest)
            try:
                offered = await source.parcel()
            except PeerError as error:
                fault = error
                continue
            # Another node may keep the same content in other pieces.
            if parcel is None or [(i.name, i.size) for i in offered.items] == [
                (i.name, i.size) for i in parcel.items
            ]:
                parcel = parcel or offered
                if offered.hashes:
                    measures.append(node)
                if self._reach is not None:
                    piece = self._pace.piece(DirectSource.PIECE)
                    sources.append(DirectSource(self._reach, node, model.digest, piece))
                else:
                    sources.append(_Guarded(source))
        if parcel is None:
            raise fault or SourceError("no node could be asked for it")
        check_items(parcel.items)

        def check(folder: Path) -> str:
            return fault_of(folder, parcel.items, model.digest)

        own = replace(model, source="own")
        await self._land(flight, own, parcel.items, model.digest, sources, check, measures)

    # From the hub

    async def _from_hub(self, flight: _Flight, name: Name) -> None:
        if self._session is None:
            self._session = aiohttp.ClientSession()
        hub = Hub(self._session, self._environ)
        paths, items = await hub.items(name)
        check_items(items)
        key = hashlib.sha256(repr((str(name), items)).encode()).hexdigest()
        model = Model(str(name), key, "own", (), sum(item.size for item in items), 0.0)

        def check(folder: Path) -> str:
            return fault_of(folder, items, "")

        await self._land(flight, model, items, key, [hub.source(name, paths)], check)

    async def _land(
        self,
        flight: _Flight,
        model: Model,
        items: tuple[Item, ...],
        key: str,
        sources: Sequence[Source | BlockingSource],
        check: Callable[[Path], str],
        measures: Sequence[str] = (),
    ) -> None:
        """``measures``: nodes that can tell whether parts are right; one after the other is asked."""
        landing = Landing(self._catalogue.own, key[:32], items, model=model.name)
        fill: Fill | None = None

        def tell() -> None:
            for index, item in enumerate(items):
                digest = item.sha256 or hashlib.sha256(f"{key} {index}".encode()).hexdigest()
                flight.say(
                    f"pulling {digest[:12]}",
                    digest=f"sha256:{digest}",
                    total=item.size,
                    completed=fill.received(index) if fill else landing.completed_of(index),
                )

        try:
            await in_thread(self._threads, landing.open)
            # The one by whose word the parts of an earlier attempt were taken goes first.
            nodes = sorted(measures, key=lambda node: node != landing.measure) or [""]
            for left, node in enumerate(nodes, 1 - len(nodes)):
                measure = PartCheck(self._calls, node, key, landing, self._threads) if node else None
                fill = Fill(
                    landing,
                    sources,
                    self._pace,
                    self._threads,
                    connections=_CONNECTIONS,
                    check=measure.right if measure else None,
                    on_progress=tell,
                )
                tell()
                try:
                    if measure is not None:
                        await measure.adopt()
                    await fill.run()
                    break
                except CheckLost as lost:
                    if not left:
                        raise
                    log.info("%s; another node is asked", lost)
            tell()
            flight.say("verifying sha256 digest")
            verifying = asyncio.ensure_future(in_thread(self._threads, landing.verify, check))
            try:
                await asyncio.shield(verifying)
            except asyncio.CancelledError:
                landing.stop()
                await asyncio.gather(verifying, return_exceptions=True)
                raise
            flight.say("writing manifest")
            card = msgspec.json.encode(replace(model, files=(), projector="", adapters=adapters_in(items)))
            folder = slug(model.name, model.digest)
            await in_thread(self._threads, landing.settle, folder, {CARD: card})
        finally:
            landing.close()
            for source in sources:
                if isinstance(source, DirectSource):
                    source.close()
        await self._catalogue.refresh()

    # Through Ollama

    async def _through_ollama(self, flight: _Flight, name: str) -> None:
        if self._session is None:
            self._session = aiohttp.ClientSession()
        url = f"{self._ollama_url()}/api/pull"
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
        done, patience = False, _SILENCE
        try:
            asking = self._session.post(url, json={"model": name, "stream": True}, timeout=timeout)
            async with await asyncio.wait_for(asking, patience) as answer:
                while raw := await asyncio.wait_for(answer.content.readline(), patience):
                    line = json.loads(raw) if raw.strip() else {}
                    if not isinstance(line, dict):
                        continue
                    if error := line.get("error"):
                        missing = "file does not exist" in str(error) or "not found" in str(error)
                        raise PullError(f"Ollama could not pull {name}: {error}", missing=missing)
                    status = str(line.pop("status", ""))
                    done = done or status == "success"
                    patience = _CHECKING if status.startswith("verifying") else _SILENCE
                    if status and status != "success":
                        flight.say(status, **line)
        except TimeoutError:
            raise PullError(
                f"Ollama has not said a word for {patience:.0f} s while it pulled {name}; see its log"
            ) from None
        except (aiohttp.ClientError, OSError, ValueError, RecursionError) as error:
            raise PullError(f"Ollama broke off while it pulled {name}: {error}") from None
        if not done:
            raise PullError(f"Ollama broke off while it pulled {name}; pull it again to go on")
        await self._catalogue.refresh()


class _Guarded:
    """A node's bytes with faults in `Fill`'s words."""

    def __init__(self, source: NodeSource) -> None:
        self.name = source.name
        self._source = source

    async def read(self, index: int, start: int, end: int) -> AsyncIterator[bytes]:
        try:
            async for piece in self._source.read(index, start, end):
                yield piece
        except (PeerError, aiohttp.ClientError, TimeoutError) as error:
            raise SourceError(str(error) or "no bytes came in time") from None


def _look_at(task: asyncio.Task[None]) -> None:
    """Every watcher may have gone: then nobody else asks for the error."""
    if not task.cancelled():
        task.exception()
