"""Peers remembered on disk: where nodes were when they were last alive."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from sollold.cluster.actions import Address
from sollold.cluster.state_file import read_bounded, write_whole

log = logging.getLogger("sollold.cluster")

_MOST = 256
_SETTLE = 2.0
"""Seconds that news are given to settle before they are written."""
_CLOSE = 3.0
"""Seconds that the last write may take."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A node and its addresses, the best first."""

    node: str
    addresses: tuple[Address, ...]


class PeersFile:
    """The file ``peers.json`` in the state folder. Its methods block for the disk."""

    def __init__(self, state: Path) -> None:
        self._path = state / "peers.json"

    def read(self) -> tuple[Peer, ...]:
        """Who is remembered; nobody when the file is not there or spoilt."""
        try:
            return msgspec.json.decode(read_bounded(self._path), type=tuple[Peer, ...])[:_MOST]
        except FileNotFoundError:
            return ()
        except (OSError, msgspec.DecodeError) as error:
            log.warning("the remembered peers in %s can't be read: %s", self._path, error)
            return ()

    def write(self, peers: tuple[Peer, ...]) -> None:
        """Remember ``peers``.

        Raises:
            OSError: the file can't be written.
        """
        write_whole(self._path, msgspec.json.format(msgspec.json.encode(peers[:_MOST]), indent=1))


class PeersWriter:
    """Keeps the file up with the cluster, in the background.

    Args:
        now: who is there, and where.
    """

    def __init__(self, file: PeersFile, now: Callable[[], tuple[Peer, ...]]) -> None:
        self._file = file
        self._now = now
        self._known: tuple[Peer, ...] = ()
        self._saved: tuple[Peer, ...] = ()
        self._task: asyncio.Task[None] | None = None
        self._news = False
        self._closing = asyncio.Event()

    async def read(self) -> tuple[Peer, ...]:
        """Who is remembered from before."""
        self._known = self._saved = await asyncio.to_thread(self._file.read)
        return self._known

    def write_soon(self) -> None:
        """Remember who is there now, and write it when the news have settled."""
        self._news = True
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="peers file")

    async def close(self) -> None:
        """Write what is not written yet. ``now`` must be good still; a disk that hangs is not waited for."""
        self._closing.set()
        self.write_soon()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=_CLOSE)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        try:
            while self._news:
                self._news = False
                await asyncio.sleep(0)  # the core has told all that changed
                self._remember()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._closing.wait(), _SETTLE)
                self._remember()
                await self._write()
        finally:
            self._task = None

    def _remember(self) -> None:
        self._known = merged(self._now(), self._known)

    async def _write(self) -> None:
        known = self._known
        if known == self._saved:
            return
        try:
            await asyncio.to_thread(self._file.write, known)
            self._saved = known
        except OSError as error:
            log.warning("the peers can't be remembered on disk: %s", error)


def merged(live: tuple[Peer, ...], before: tuple[Peer, ...]) -> tuple[Peer, ...]:
    """The live ones first, then those remembered from before, as many as fit.

    One whose address another node has now is not remembered: its machine was set up anew, or it moved.
    """
    known = {peer.node for peer in live}
    taken = {address for peer in live for address in peer.addresses[:1]}
    rest = (one for one in before if one.node not in known and taken.isdisjoint(one.addresses[:1]))
    return (*live, *rest)[:_MOST]
