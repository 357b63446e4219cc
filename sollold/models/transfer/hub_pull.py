"""Prepares the download of a model from Hugging Face's hub."""

from __future__ import annotations

import hashlib
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path

import msgspec

from sollold.models.model import Model
from sollold.models.names import Name
from sollold.models.stores.catalogue import Catalogue
from sollold.models.stores.folders import CARD, read_card
from sollold.models.stores.threads import in_thread
from sollold.models.transfer.fetch_files import Download
from sollold.models.transfer.huggingface_hub import Hub
from sollold.models.transfer.partial_file import Item
from sollold.models.transfer.peer_source import paths_of
from sollold.models.transfer.pull_progress import Say
from sollold.models.transfer.verify import check_items, have_content
from sollold.settings.state_file import write_whole


def version_of(name: Name, items: tuple[Item, ...]) -> str:
    """Return what identifies a version on the hub, the same for all tags that refer to these files."""
    repository = f"{name.namespace}/{name.model}".lower()
    return hashlib.sha256(repr((repository, items)).encode()).hexdigest()


async def hub_download(
    hub: Hub, name: Name, present: Model | None, catalogue: Catalogue, threads: Executor, say: Say
) -> Download | None:
    """Return the download of a model's version on the hub; None if ``present`` is that version.

    Raises:
        HubError: the hub can't be reached, or has no such files.
        SourceError: its files can't be stored.
        OSError: those of ``present`` can't be read.
    """
    paths, items = await hub.items(name)
    check_items(items)
    key = version_of(name, items)
    if present is not None:
        if present.version == key:
            return None
        # A copy from a node of an earlier release does not know its version: the files are compared once.
        if await have_content(paths_of(present), items, threads, say):
            async with catalogue.changing:
                await in_thread(threads, _remember, Path(present.files[0]).parent, key)
            await catalogue.refresh()
            return None
    model = Model(str(name), key, "own", (), sum(item.size for item in items), 0.0)

    return Download(model, items, key, [hub.source(name, paths)])


def _remember(folder: Path, version: str) -> None:
    card = read_card(folder)
    if card is not None:
        write_whole(folder / CARD, msgspec.json.encode(replace(card, version=version)), durable=False)
