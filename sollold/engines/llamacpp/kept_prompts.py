"""Saves processed prompts to disk when an idle deployment ends, for the next load of its model.

llama-server writes a slot's KV cache (``/slots/{id}?action=save``) and the next one restores it: its head
transfers the workers' parts through their tunnels. That saves processing the prompt again, which over a LAN
can take minutes. The files contain prompts and answers as token numbers: they are readable only by the
daemon's user, and are deleted when the daemon ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

import aiohttp
import msgspec

from sollold.cluster.gossip.record import NGRAM
from sollold.engines.address import EngineAddress
from sollold.facts import dataclass
from sollold.models.model import Model
from sollold.placement.plan import Plan
from sollold.undecodable import UNDECODABLE

log = logging.getLogger("sollold.engines")

P = ParamSpec("P")
T = TypeVar("T")

_MIN_TOKENS = 256
"""Shorter prompts are processed faster than a file is read."""
_SAVE_SECONDS = 5.0
"""Timeout for all slots of a deployment, in seconds: a load may be waiting for its memory."""
_RESTORE_SECONDS = 5.0
_DISK_SECONDS = 5.0
"""Timeout for listing or deleting files, in seconds: a disk that hangs must not stop a load or an unload."""
_SPARE_DISK = 2 << 30
"""Bytes that stay free on the disk."""
_FAILURES = (aiohttp.ClientError, TimeoutError, OSError, *UNDECODABLE)


class _Slot(msgspec.Struct):
    id: int
    is_processing: bool = False
    n_prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    slot: int
    size: int
    modified: float


class KeptPrompts:
    """The folder of a node's saved prompts.

    Args:
        folder: created when needed; it must contain nothing else.
        limit: total size of the files in bytes; 0: save nothing.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._closed = False

    @property
    def folder(self) -> Path | None:
        """Folder for ``--slot-save-path``; None if nothing is saved."""
        return self._folder if self._limit > 0 else None

    def open(self) -> None:
        """Create the folder, deleting an earlier run's; if that fails, nothing will be saved. Blocks."""
        try:
            self.close()
            if self._limit > 0:
                self._folder.mkdir(parents=True, mode=0o700)
                self._closed = False
        except OSError as error:
            log.warning("processed prompts are not saved: %s", error)
            self._limit = 0

    def close(self) -> None:
        """Stop saving, and delete the folder. Blocks."""
        self._closed = True
        shutil.rmtree(self._folder, ignore_errors=True)

    async def save(
        self, http: aiohttp.ClientSession, engine: EngineAddress, key: str, size: int, cells: int
    ) -> None:
        """Have an idle engine save its slots, under ``key``: the `key_of` its deployment.

        ``size``: bytes of its whole KV cache, which has room for ``cells`` tokens: a slot takes a share in
        proportion to its tokens. Slots that fail to save are skipped.
        """
        if self._closed or self._limit <= 0:
            return
        saved, left = 0, self._limit
        try:
            async with asyncio.timeout(_SAVE_SECONDS):
                for slot in await _slots(http, engine):
                    if slot.is_processing or slot.n_prompt_tokens < _MIN_TOKENS:
                        continue
                    needed = size * slot.n_prompt_tokens // max(cells, 1)
                    if needed > left or await asyncio.to_thread(self._free) < needed + _SPARE_DISK:
                        continue
                    left -= needed
                    part = f"{key}-{slot.id}.part"
                    await _slot_action(http, engine, slot.id, "save", part)
                    await asyncio.to_thread(self._take_over, part, f"{key}-{slot.id}")
                    saved += slot.n_prompt_tokens
        except _FAILURES as error:
            log.debug("an engine's prompts were not saved: %s", error or "it took too long")
        finally:
            with contextlib.suppress(TimeoutError):
                await _on_disk(self._prune, key)
        if saved:
            log.info("saved %d tokens of processed prompts", saved)

    async def restore(self, http: aiohttp.ClientSession, engine: EngineAddress, key: str) -> None:
        """Have a newly started engine restore the slots saved under ``key``. Failures are ignored."""
        if self._limit <= 0:
            return
        with contextlib.suppress(TimeoutError):
            for file in await _on_disk(self._files):
                if file.path.name == f"{key}-{file.slot}":
                    await self._restore(http, engine, file)
                    # It is saved again when this deployment ends.
                    await _on_disk(_remove, file.path)

    async def _restore(self, http: aiohttp.ClientSession, engine: EngineAddress, file: _File) -> None:
        try:
            async with asyncio.timeout(_RESTORE_SECONDS):
                await _slot_action(http, engine, file.slot, "restore", file.path.name)
        except _FAILURES as error:
            log.debug("saved prompts can't be used: %s", error or "it took too long")

    def _take_over(self, part: str, name: str) -> None:
        file = self._folder / part
        file.chmod(0o600)
        file.replace(self._folder / name)

    def _free(self) -> int:
        return shutil.disk_usage(self._folder).free

    def _files(self) -> list[_File]:
        """Return all files, newest first; incomplete ones have slot -1."""
        found = []
        with contextlib.suppress(OSError):
            for path in self._folder.iterdir():
                slot = path.name.rpartition("-")[2]
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    number = int(slot) if slot.isdecimal() else -1
                    found.append(_File(path, number, status.st_size, status.st_mtime))
        return sorted(found, key=lambda file: file.modified, reverse=True)

    def _prune(self, key: str) -> None:
        """Delete what ``key`` has left incomplete, and the oldest files beyond the limit.

        Another engine may still write its incomplete files.
        """
        total = 0
        for file in self._files():
            total += file.size
            incomplete = file.slot < 0
            if file.path.name.startswith(f"{key}-") if incomplete else total > self._limit:
                _remove(file.path)


async def _on_disk(function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """Run ``function`` in a thread.

    Raises:
        TimeoutError: the disk does not respond.
    """
    async with asyncio.timeout(_DISK_SECONDS):
        return await asyncio.to_thread(function, *arguments, **named)


def _remove(file: Path) -> None:
    """Delete a file if possible: a failing disk must not break a load or an unload."""
    with contextlib.suppress(OSError):
        file.unlink()


def can_keep(plan: Plan, drafts_by: str) -> bool:
    """Return whether an engine can continue from slots that another one saved; ``drafts_by``: as in `Plan`.

    With a sliding window llama.cpp processes a prompt again after a load, whatever it has restored. A draft
    model or MTP layer has a cache of its own, which is not saved: all its drafts would be wrong.
    """
    return not (plan.run.embedding or plan.windowed) and drafts_by in ("", NGRAM)


def key_of(plan: Plan, model: Model, build: str, extra: Sequence[str]) -> str:
    """Return a key, equal for deployments whose engines can restore each other's slots, wherever they run."""
    run = plan.run
    parts = (
        *(model.digest, *model.adapters, model.projector, build, *extra),
        *(str(run.request_context), str(run.slots), run.type_k, run.type_v, str(run.unified)),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


async def _slots(http: aiohttp.ClientSession, engine: EngineAddress) -> list[_Slot]:
    async with http.get(f"{engine.url}/slots", headers=engine.headers) as answer:
        answer.raise_for_status()
        return msgspec.json.decode(await answer.read(), type=list[_Slot])


async def _slot_action(
    http: aiohttp.ClientSession, engine: EngineAddress, slot: int, action: str, file: str
) -> None:
    url = f"{engine.url}/slots/{slot}?action={action}"
    async with http.post(url, json={"filename": file}, headers=engine.headers) as answer:
        answer.raise_for_status()
        await answer.read()
