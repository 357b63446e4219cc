"""Fetches a model into the folder for pulled models: downloads parts, verifies them, puts all in place."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import field, replace
from pathlib import Path

import msgspec

from sollold.cluster.net.rpc_client import RpcClient
from sollold.facts import dataclass
from sollold.models.model import Model
from sollold.models.stores.catalogue import Catalogue
from sollold.models.stores.folders import CARD, read_card
from sollold.models.stores.threads import in_stoppable_thread, in_thread
from sollold.models.transfer.download import BlockingSource, CheckLost, Downloader, Source
from sollold.models.transfer.part_check import PartCheck
from sollold.models.transfer.partial_file import Item, PartialFile, PartialFileError, slug
from sollold.models.transfer.peer_source import paths_of
from sollold.models.transfer.pull_progress import Say
from sollold.models.transfer.rate_limit import RateLimit
from sollold.models.transfer.verify import adapters_in, fault_of, have_content

log = logging.getLogger("sollold.models")

_CONNECTIONS = 4


@dataclass(frozen=True, slots=True)
class Download:
    """A download to perform.

    Attributes:
        model: facts written beside the files, so that they are listed as at the source.
        key: identifies the download, so that it resumes where it stopped.
        content: the digest that the received content must have; empty: any.
        verifiers: nodes that can verify parts, with their display names; they are tried one after another.
        replaces: folder of an older version, whose place it takes; ``card``: the facts stored in it.
    """

    model: Model
    items: tuple[Item, ...]
    key: str
    sources: Sequence[Source | BlockingSource]
    content: str = ""
    verifiers: Mapping[str, str] = field(default_factory=dict)
    replaces: Path | None = None
    card: Model | None = None


async def download(
    job: Download, catalogue: Catalogue, calls: RpcClient, pace: RateLimit, threads: Executor, say: Say
) -> None:
    """Fetch a model into the folder for pulled models and list it, reporting progress to ``say``.

    Raises:
        PartialFileError: the disk has no room, the received data is wrong, or what it replaces was changed
            meanwhile.
        SourceError: no source provides the data.
        OSError: a file operation failed.
    """

    before = catalogue.get(job.model.name)
    if await _link(job, before, catalogue, threads, say):
        return

    def check(folder: Path) -> str:
        return fault_of(folder, job.items, job.content)

    partial = PartialFile(catalogue.own, job.key[:32], job.items, model=job.model.name)
    try:
        await in_thread(threads, partial.open)
        await _receive(job, partial, calls, pace, threads, say)
        say("verifying sha256 digest")
        await in_stoppable_thread(threads, partial.stop, partial.verify, check)
        say("writing manifest")
        async with catalogue.changing:
            await _settle(job, partial, before, catalogue, threads)
    finally:
        partial.close()


async def _link(
    job: Download, before: Model | None, catalogue: Catalogue, threads: Executor, say: Say
) -> bool:
    """Return whether the files of another name of the same version, pulled earlier, were linked to this one.

    Raises:
        As `_settle`.
    """
    present = (model for model in catalogue.models if model.source == "own" and not model.unusable)
    twin = next((model for model in present if model.version == job.key and model.files), None)
    if twin is None or Path(twin.files[0]).parent == job.replaces:
        return False
    # Not the folder of the download itself, which may be resumed: that would write to the linked files.
    key = hashlib.sha256(f"link {job.key}".encode()).hexdigest()[:32]
    partial = PartialFile(catalogue.own, key, job.items)
    try:
        if not await have_content(paths_of(twin), job.items, threads, say):
            return False
        await in_thread(threads, partial.link, paths_of(twin))
    except OSError as error:
        log.info("%s is downloaded though %s has the same files: %s", job.model.name, twin.name, error)
        return False
    say("writing manifest")
    async with catalogue.changing:
        await _settle(job, partial, before, catalogue, threads)
    return True


async def _settle(
    job: Download, partial: PartialFile, before: Model | None, catalogue: Catalogue, threads: Executor
) -> None:
    """Put a complete download into its place. ``before``: the model that had the name at its start.

    Raises:
        PartialFileError: the name was deleted, or given to other content, during the download.
        OSError: a file operation failed.
    """
    name = job.model.name
    if job.replaces is not None and await in_thread(threads, read_card, job.replaces) != job.card:
        raise PartialFileError(f"{name} was deleted or replaced during its update; pull it again")
    # An abandoned pull of the same content may have put it there just now.
    present = catalogue.get(name) if before is None else None
    if present is not None and present.source == "own" and present.digest != job.model.digest:
        raise PartialFileError(f"{name} was given to another model meanwhile; delete it and pull it again")
    names = tuple(item.name for item in job.items)
    card = replace(job.model, files=names, projector="", adapters=adapters_in(job.items))
    small_files = {CARD: msgspec.json.encode(card)}
    await in_thread(threads, partial.settle, slug(name, job.model.digest), small_files, job.replaces)
    await catalogue.refresh()


async def _receive(
    job: Download, partial: PartialFile, calls: RpcClient, pace: RateLimit, threads: Executor, say: Say
) -> None:
    """Download what is missing; if the verifying node is lost, continue with the next one."""
    # The node that verified the parts of an earlier attempt goes first.
    nodes = sorted(job.verifiers, key=lambda node: node != partial.measure) or [""]
    for remaining, node in enumerate(nodes, 1 - len(nodes)):
        verifier = PartCheck(calls, node, job.verifiers[node], job.key, partial, threads) if node else None
        downloader = _downloader(job, partial, verifier, pace, threads, say)
        _report(job, downloader, say)
        try:
            if verifier is not None:
                await verifier.adopt()
            await downloader.run()
            break
        except CheckLost as error:
            if not remaining:
                raise
            log.info("%s; another node is asked", error)
    _report(job, downloader, say)


def _downloader(
    job: Download,
    partial: PartialFile,
    verifier: PartCheck | None,
    pace: RateLimit,
    threads: Executor,
    say: Say,
) -> Downloader:
    downloader = Downloader(
        partial,
        job.sources,
        pace,
        threads,
        connections=_CONNECTIONS,
        check=verifier.right if verifier else None,
        on_progress=lambda: _report(job, downloader, say),
        on_retry=lambda reason: say(f"{reason}; trying again"),
    )
    return downloader


def _report(job: Download, downloader: Downloader, say: Say) -> None:
    for index, item in enumerate(job.items):
        digest = item.sha256 or hashlib.sha256(f"{job.key} {index}".encode()).hexdigest()
        say(
            f"pulling {digest[:12]}",
            digest=f"sha256:{digest}",
            total=item.size,
            completed=downloader.received(index),
        )
