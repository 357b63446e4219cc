"""The files of one model into our own folder: downloaded in parts, verified, then put in place as a whole."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import field, replace
from pathlib import Path

import msgspec

from sollold.cluster.net.rpc_client import Calls
from sollold.facts import dataclass
from sollold.models.model import Model
from sollold.models.stores.folders import CARD
from sollold.models.stores.threads import in_thread
from sollold.models.transfer.download import BlockingSource, CheckLost, Downloader, Source
from sollold.models.transfer.part_check import PartCheck
from sollold.models.transfer.partial_file import Item, PartialFile, slug
from sollold.models.transfer.pull_progress import Say
from sollold.models.transfer.rate_limit import RateLimit
from sollold.models.transfer.verify import adapters_in

log = logging.getLogger("sollold.models")

_CONNECTIONS = 4


@dataclass(frozen=True, slots=True)
class Download:
    """What is to be fetched.

    Attributes:
        model: what is written beside the files, so that they are listed as they were.
        key: names the download, so that it goes on where it stopped.
        check: what is wrong with the files of a folder; empty: nothing.
        verifiers: nodes that can tell whether parts are right, and their names for people; one after the
            other is asked.
    """

    model: Model
    items: tuple[Item, ...]
    key: str
    sources: Sequence[Source | BlockingSource]
    check: Callable[[Path], str]
    verifiers: Mapping[str, str] = field(default_factory=dict)


async def download(
    job: Download, own: Path, calls: Calls, pace: RateLimit, threads: Executor, say: Say
) -> None:
    """Fetch into a folder of ``own``, with progress to ``say``.

    Raises:
        PartialFileError: there is no room, or what came is wrong.
        SourceError: no source gives the bytes.
        OSError: the disk refused.
    """
    partial = PartialFile(own, job.key[:32], job.items, model=job.model.name)
    try:
        await in_thread(threads, partial.open)
        await _receive(job, partial, calls, pace, threads, say)
        say("verifying sha256 digest")
        verifying = asyncio.ensure_future(in_thread(threads, partial.verify, job.check))
        try:
            await asyncio.shield(verifying)
        except asyncio.CancelledError:
            partial.stop()
            await asyncio.gather(verifying, return_exceptions=True)
            raise
        say("writing manifest")
        card = replace(job.model, files=(), projector="", adapters=adapters_in(job.items))
        folder = slug(job.model.name, job.model.digest)
        await in_thread(threads, partial.settle, folder, {CARD: msgspec.json.encode(card)})
    finally:
        partial.close()


async def _receive(
    job: Download, partial: PartialFile, calls: Calls, pace: RateLimit, threads: Executor, say: Say
) -> None:
    """Download what is missing; while a node that verifies is lost, with the next."""
    # The one by whose word the parts of an earlier attempt were taken goes first.
    nodes = sorted(job.verifiers, key=lambda node: node != partial.measure) or [""]
    for left, node in enumerate(nodes, 1 - len(nodes)):
        verifier = _verifier(job, partial, calls, node, threads)
        downloader = _downloader(job, partial, verifier, pace, threads, say)
        _tell(job, downloader, say)
        try:
            if verifier is not None:
                await verifier.adopt()
            await downloader.run()
            break
        except CheckLost as lost:
            if not left:
                raise
            log.info("%s; another node is asked", lost)
    _tell(job, downloader, say)


def _verifier(
    job: Download, partial: PartialFile, calls: Calls, node: str, threads: Executor
) -> PartCheck | None:
    return PartCheck(calls, node, job.verifiers[node], job.key, partial, threads) if node else None


def _downloader(
    job: Download,
    partial: PartialFile,
    verifier: PartCheck | None,
    pace: RateLimit,
    threads: Executor,
    say: Say,
) -> Downloader:
    made = Downloader(
        partial,
        job.sources,
        pace,
        threads,
        connections=_CONNECTIONS,
        check=verifier.right if verifier else None,
        on_progress=lambda: _tell(job, made, say),
    )
    return made


def _tell(job: Download, downloader: Downloader, say: Say) -> None:
    for index, item in enumerate(job.items):
        digest = item.sha256 or hashlib.sha256(f"{job.key} {index}".encode()).hexdigest()
        say(
            f"pulling {digest[:12]}",
            digest=f"sha256:{digest}",
            total=item.size,
            completed=downloader.received(index),
        )
