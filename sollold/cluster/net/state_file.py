"""The files of the state folder: replaced atomically, written in the background.

``membership.json`` has the gossip core's persistent state, ``peers.json`` the nodes to try at the start.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from sollold.cluster.gossip.actions import Address, PersistedState
from sollold.cluster.gossip.term import Term, follows
from sollold.errors import system_words
from sollold.facts import dataclass
from sollold.settings.state_file import read_json, write_whole
from sollold.tasks import cancel_and_wait
from sollold.turns import sleep_until_set

log = logging.getLogger("sollold.cluster")

T = TypeVar("T")

_CLOSE_SECONDS = 3.0
"""Timeout for the last write when closing, in seconds."""
RETRY_SECONDS = 10.0
"""Delay after a failed write, in seconds: unwritten data is lost with the daemon."""
_SETTLE_SECONDS = 2.0
"""Changes of the peers within these seconds are written together."""
_MAX_PEERS = 256
_MAX_COUNT = 2**48
"""Limit of versions and incarnations, which count single events: no node gets there."""


class BackgroundWriter(Generic[T]):
    """Writes a value to disk off the loop: one write at a time, and always the newest value.

    It has its own thread, so that a slow disk blocks no other work. An error is logged; the value is written
    with the next request, or by a retry once the disk accepts it again.

    Args:
        name: name of the data, for log messages.
        read: returns the value to write, called on the loop just before each write.
        write: writes the value; blocks, raises OSError.
        settle: seconds to wait for further requests before a write; `close` cuts it short.
        written: called on the loop after each write, even a failed one.
    """

    def __init__(
        self,
        name: str,
        read: Callable[[], T],
        write: Callable[[T], None],
        *,
        settle: float = 0.0,
        written: Callable[[T], None] | None = None,
    ) -> None:
        self._name = name
        self._read = read
        self._write = write
        self._settle = settle
        self._written = written
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._requested = False
        self._wake = asyncio.Event()
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def request(self) -> None:
        """Request a write of a new value."""
        self._requested = True
        self._wake.set()
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name=self._name)

    async def close(self) -> None:
        """Finish pending writes; wait a few seconds at most."""
        self._closing.set()
        self._wake.set()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=_CLOSE_SECONDS)
        await cancel_and_wait(self._task)
        self._thread.shutdown(wait=False)

    async def _run(self) -> None:
        fault = ""
        try:
            while self._requested:
                if self._settle:
                    await sleep_until_set(self._closing, self._settle)
                self._requested = False
                self._wake.clear()
                value = self._read()
                before, fault = fault, await self._try(value)
                if fault and fault != before:
                    # A full disk must not end the cluster: the peers know what this node forgets.
                    log.error("%s can't be written: %s", self._name, fault)
                elif before and not fault:
                    log.info("%s can be written again", self._name)
                if self._written is not None:
                    self._written(value)
                if fault and not self._closing.is_set():
                    await sleep_until_set(self._wake, RETRY_SECONDS)
                    self._requested = True
        finally:
            self._task = None

    async def _try(self, value: T) -> str:
        """Try to write. Returns why it failed; empty on success."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._write, value)
        except (OSError, RuntimeError) as error:
            # RuntimeError: the system refuses to start another thread.
            return system_words(error)
        return ""


def checked(kept: PersistedState) -> PersistedState:
    """Return ``kept`` with implausible values reset as at a first start."""
    return PersistedState(
        kept.term if follows(kept.term, Term()) else Term(),
        kept.version if 0 <= kept.version < _MAX_COUNT else 0,
        kept.incarnation if 0 <= kept.incarnation < _MAX_COUNT else 0,
    )


class KeptFile:
    """The file ``membership.json`` in the state folder. Its methods block on disk I/O."""

    def __init__(self, state: Path) -> None:
        self._path = state / "membership.json"

    def read(self) -> PersistedState:
        """Return the last run's state; an empty one if the file is missing or damaged (peers know it)."""
        kept = read_json(self._path, PersistedState) or PersistedState()
        if checked(kept) != kept:
            log.warning("%s has implausible values, which are ignored", self._path)
        return checked(kept)

    def write(self, kept: PersistedState) -> None:
        """Replace the file.

        Raises:
            OSError: the file can't be written.
        """
        write_whole(self._path, msgspec.json.encode(kept))


@dataclass(frozen=True, slots=True)
class Peer:
    """A node and its addresses, the best first."""

    node: str
    addresses: tuple[Address, ...]


class PeersFile:
    """The file ``peers.json`` in the state folder. Its methods block on disk I/O."""

    def __init__(self, state: Path) -> None:
        self._path = state / "peers.json"

    def read(self) -> tuple[Peer, ...]:
        """Return the remembered peers; none if the file is missing or damaged."""
        return (read_json(self._path, tuple[Peer, ...]) or ())[:_MAX_PEERS]

    def write(self, peers: tuple[Peer, ...]) -> None:
        """Replace the file.

        Raises:
            OSError: the file can't be written.
        """
        write_whole(self._path, msgspec.json.format(msgspec.json.encode(peers[:_MAX_PEERS]), indent=1))


class RememberedPeers:
    """The peers of this run and of earlier ones, saved on disk.

    Args:
        live: returns the live peers and their addresses.
    """

    def __init__(self, state: Path, live: Callable[[], tuple[Peer, ...]]) -> None:
        self._file = PeersFile(state)
        self._live = live
        self._known: tuple[Peer, ...] = ()
        self._writer = BackgroundWriter("the list of peers", self._merge, self._write, settle=_SETTLE_SECONDS)
        self._on_disk: tuple[Peer, ...] = ()

    async def read(self) -> tuple[Peer, ...]:
        """Read the peers of earlier runs."""
        self._known = self._on_disk = await asyncio.to_thread(self._file.read)
        return self._known

    def update(self) -> None:
        """Remember the changed live peers, and write the file a little later."""
        self._merge()
        self._writer.request()

    async def close(self) -> None:
        """Finish pending writes. ``live`` must still work."""
        self._writer.request()
        await self._writer.close()

    def _merge(self) -> tuple[Peer, ...]:
        self._known = merged(self._live(), self._known)
        return self._known

    def _write(self, peers: tuple[Peer, ...]) -> None:
        if peers != self._on_disk:
            self._file.write(peers)
            self._on_disk = peers


def merged(live: tuple[Peer, ...], before: tuple[Peer, ...]) -> tuple[Peer, ...]:
    """Return the live peers, then earlier ones, up to the limit.

    A peer whose first address now belongs to another node is dropped: its machine was reinstalled, or moved.
    """
    known = {peer.node for peer in live}
    taken = {address for peer in live for address in peer.addresses[:1]}
    rest = (peer for peer in before if peer.node not in known and taken.isdisjoint(peer.addresses[:1]))
    return (*live, *rest)[:_MAX_PEERS]
