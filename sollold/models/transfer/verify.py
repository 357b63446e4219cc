"""Verifies that files from elsewhere are what was requested."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Executor
from pathlib import Path

from sollold.models.stores.content_digest import joined
from sollold.models.stores.header_facts import read_facts
from sollold.models.stores.threads import in_thread
from sollold.models.transfer.download import SourceError
from sollold.models.transfer.file_digest import sha256_between
from sollold.models.transfer.partial_file import Item
from sollold.models.transfer.pull_progress import Say

_MAX_NAME_CHARACTERS = 200
"""Maximum length of a file name, in characters; a file system allows 255 bytes."""

_MAX_FILES = 500
"""Maximum number of files of a model: all are open during a download."""


def check_items(items: tuple[Item, ...]) -> None:
    """Check names from outside, which become names of local files: only plain ones are accepted.

    Raises:
        SourceError: one is not.
    """
    if len(items) > _MAX_FILES:
        raise SourceError(f"the model has {len(items)} files; at most {_MAX_FILES} are accepted")
    names = set[str]()
    for item in items:
        plain = (
            item.name == Path(item.name).name
            and item.name.isprintable()
            and len(item.name) <= _MAX_NAME_CHARACTERS
            and item.name.endswith(".gguf")
            and not item.name.startswith(".")
        )
        if not plain or item.size <= 0 or item.name in names:
            raise SourceError(f"{item.name!r} of {item.size} bytes is not the file of a model")
        names.add(item.name)


def adapters_in(items: tuple[Item, ...]) -> tuple[str, ...]:
    """Return the names of the adapters among the files."""
    return tuple(item.name for item in items if item.name.startswith("adapter-"))


def fault_of(folder: Path, items: tuple[Item, ...], digest: str) -> str:
    """Return what is wrong with received files; empty when nothing is. Blocks."""
    adapters = adapters_in(items)
    projectors = [item.name for item in items if "mmproj" in item.name.lower()]
    shards = [item.name for item in items if item.name not in adapters and item.name not in projectors]
    if not shards:
        return "the files contain no model, only a projector or adapters"
    main = read_facts(tuple(str(folder / name) for name in shards))
    if main.unusable:
        return f"the received file can't be used: {main.unusable}"
    digests = [read_facts((str(folder / name),)).digest for name in (*projectors, *adapters)]
    if digest and joined([main.digest, *digests]) != digest:
        return "the content is not what was requested"
    return ""


async def have_content(paths: tuple[str, ...], items: tuple[Item, ...], threads: Executor, say: Say) -> bool:
    """Return whether files have the sizes and sha256 digests of ``items``, in their order.

    Raises:
        OSError: they can't be read.
    """
    if len(paths) != len(items) or not await in_thread(threads, _have_sizes, paths, items):
        return False
    say("verifying sha256 digest")
    stopped = threading.Event()
    checking = asyncio.ensure_future(in_thread(threads, _have_digests, paths, items, stopped))
    try:
        return await asyncio.shield(checking)
    except asyncio.CancelledError:
        stopped.set()
        await asyncio.gather(checking, return_exceptions=True)
        raise


def _have_sizes(paths: tuple[str, ...], items: tuple[Item, ...]) -> bool:
    return all(Path(path).stat().st_size == item.size for path, item in zip(paths, items, strict=True))


def _have_digests(paths: tuple[str, ...], items: tuple[Item, ...], stopped: threading.Event) -> bool:
    for path, item in zip(paths, items, strict=True):
        with Path(path).open("rb", buffering=0) as file:
            digest = sha256_between(file.fileno(), 0, item.size, stopped.is_set) if item.sha256 else ""
        if digest != item.sha256:
            return False
    return True
