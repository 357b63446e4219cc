"""Prepares the download of a model from Hugging Face's hub."""

from __future__ import annotations

import hashlib
from concurrent.futures import Executor
from pathlib import Path

from sollold.models.model import Model
from sollold.models.names import Name
from sollold.models.stores.folders import read_card
from sollold.models.stores.threads import in_thread
from sollold.models.transfer.fetch_files import Download
from sollold.models.transfer.huggingface_hub import Hub
from sollold.models.transfer.partial_file import Item
from sollold.models.transfer.peer_source import paths_of
from sollold.models.transfer.verify import check_items


async def hub_download(hub: Hub, name: Name, present: Model | None, threads: Executor) -> Download | None:
    """Return the download of a model's version on the hub; None if ``present`` is that version.

    Raises:
        HubError: the hub can't be reached, or has no such files.
        SourceError: its files can't be stored.
    """
    paths, items = await hub.items(name)
    check_items(items)
    key = hashlib.sha256(repr((str(name), items)).encode()).hexdigest()
    if present is not None and await in_thread(threads, _is_version, present, key, items):
        return None
    model = Model(str(name), key, "own", (), sum(item.size for item in items), 0.0)

    return Download(model, items, key, [hub.source(name, paths)])


def _is_version(model: Model, key: str, items: tuple[Item, ...]) -> bool:
    """Return whether a pulled model is the version with this key. Blocks.

    The card of a copy from another node has the digest of the content instead: sizes are compared.
    """
    card = read_card(Path(model.files[0]).parent)
    if card is None or card.digest != model.digest:
        return card is None or card.digest == key
    sizes = [Path(path).stat().st_size for path in paths_of(model)]
    return sorted(sizes) == sorted(item.size for item in items)
