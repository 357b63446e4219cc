"""Prepares the download of a model from Hugging Face's hub."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import Executor
from pathlib import Path

from sollold.models.model import Model
from sollold.models.names import Name
from sollold.models.stores.folders import read_card
from sollold.models.stores.threads import in_stoppable_thread, in_thread
from sollold.models.transfer.fetch_files import Download
from sollold.models.transfer.file_digest import sha256_between
from sollold.models.transfer.huggingface_hub import Hub
from sollold.models.transfer.partial_file import Item
from sollold.models.transfer.peer_source import paths_of
from sollold.models.transfer.pull_progress import Say
from sollold.models.transfer.verify import check_items


async def hub_download(
    hub: Hub, name: Name, present: Model | None, threads: Executor, say: Say
) -> Download | None:
    """Return the download of a model's version on the hub; None if ``present`` is that version.

    Raises:
        HubError: the hub can't be reached, or has no such files.
        SourceError: its files can't be stored.
        OSError: those of ``present`` can't be read.
    """
    paths, items = await hub.items(name)
    check_items(items)
    key = hashlib.sha256(repr((str(name), items)).encode()).hexdigest()
    if present is not None and await _is_version(present, key, items, threads, say):
        return None
    model = Model(str(name), key, "own", (), sum(item.size for item in items), 0.0)
    return Download(model, items, key, [hub.source(name, paths)])


async def _is_version(model: Model, key: str, items: tuple[Item, ...], threads: Executor, say: Say) -> bool:
    """Return whether a pulled model is the version with this key.

    The card of a copy from another node has the digest of the content instead: its files are compared.

    Raises:
        OSError: they can't be read.
    """
    card = await in_thread(threads, read_card, Path(model.files[0]).parent)
    if card is not None and card.digest == key:
        return True
    paths = paths_of(model)
    if len(paths) != len(items) or not await in_thread(threads, _have_sizes, paths, items):
        return False
    say("verifying sha256 digest")
    stopped = threading.Event()
    return await in_stoppable_thread(threads, stopped.set, _have_digests, paths, items, stopped)


def _have_sizes(paths: tuple[str, ...], items: tuple[Item, ...]) -> bool:
    return all(Path(path).stat().st_size == item.size for path, item in zip(paths, items, strict=True))


def _have_digests(paths: tuple[str, ...], items: tuple[Item, ...], stopped: threading.Event) -> bool:
    for path, item in zip(paths, items, strict=True):
        with Path(path).open("rb", buffering=0) as file:
            digest = sha256_between(file.fileno(), 0, item.size, stopped.is_set) if item.sha256 else ""
        if digest != item.sha256:
            return False
    return True
