"""Fills a worker's tensor cache from local disk or other nodes before the head would send the data.

The data comes from this machine's copy of the model's file, or from several other nodes that have it, in
chunks: each node supplies as many as it can. A model's digest covers only samples of its file, so each tensor
is compared with the head's (`sollold.models.transfer.part_check`); this is skipped for files with
equal sha256 sums on both sides (Ollama's store and Hugging Face's cache name files by it). The file name that
the worker expects, the FNV-1a hash of the data, comes from llama-server's request: computing it here would
take minutes in Python, or as long again as the load itself in a worker process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sollold.agent import tensor_copy
from sollold.agent.read_ahead import ReadAhead
from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_client import RpcClient
from sollold.engines.commands import FillCache, WantedTensor
from sollold.engines.llamacpp.hash_frames import HeldHash
from sollold.engines.llamacpp.tensor_cache import TensorCache
from sollold.models.model import Model
from sollold.models.stores.threads import in_thread, lower_priority
from sollold.models.transfer.download import BlockingSource, SourceError, Stop
from sollold.models.transfer.part_check import LARGEST, PartDigestRequest, PartHash, same_bytes
from sollold.models.transfer.partial_file import Item
from sollold.models.transfer.peer_source import NodeSource, items_of, paths_of
from sollold.units import bytes_text

log = logging.getLogger("sollold.agent")

PATIENCE = 10.0
"""Seconds without progress after which the head sends its data instead."""
_PARALLEL = 2
"""Parallel copies, and parallel connections per node."""
_MAX_FAILURES = 3
"""Consecutive failures of a node's connection after which it is no longer used."""
_TIMEOUT = 30.0
_CLOSE_SECONDS = 2.0
"""Timeout of `CacheFill.close`: tasks blocked on a file that does not respond are abandoned."""

Connect = Callable[[str, str], BlockingSource]
"""(node, digest of a model) → its files on that node."""


class CacheFill:
    """Fills the cache for one deployment. Call `start`, then `offer` for each hash, and finally `close`."""

    def __init__(
        self, request: FillCache, cache: TensorCache, local: Model | None, calls: RpcClient, connect: Connect
    ) -> None:
        """``local``: the model on this machine, if present."""
        self._request = request
        self._cache = cache
        self._local = local
        self._calls = calls
        self._connect = connect
        loop = asyncio.get_running_loop()
        self._tensors = {tensor.name: tensor for tensor in request.tensors}
        self._numbers = {name: str(number) for number, name in enumerate(self._tensors)}
        self._files: dict[str, asyncio.Future[Path | None]] = {n: loop.create_future() for n in self._tensors}
        self._whole: frozenset[int] = frozenset()
        self._stops: list[Stop] = []
        self._chunks = 0
        self._task: asyncio.Task[None] | None = None
        self._kept: ReadAhead | None = None
        self._reading: asyncio.Task[None] | None = None
        self._filled = 0
        self._waited = 0.0

    def start(self) -> None:
        """Start collecting the tensors in a background task."""
        self._task = asyncio.create_task(self._run(), name=f"cache of {self._request.deployment}")

    async def close(self) -> None:
        """Stop all work."""
        self._stop()
        tasks = [task for task in (self._task, self._reading) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_CLOSE_SECONDS)
        self._give_up()
        if self._filled:
            log.info(
                "%s of the model were not loaded through the head, which waited %.1f s for them",
                bytes_text(self._filled),
                self._waited,
                extra={"deployment": self._request.deployment},
            )

    async def offer(self, held: HeldHash) -> bool:
        """Wait until the tensor of a held hash is ready, and give it to the worker. Never raises.

        Returns:
            Whether the worker will find it.
        """
        tensor = self._tensors.get(held.name)
        if tensor is None or held.offset or (held.type, held.shape) != (tensor.type, tensor.shape):
            return False
        ready = self._files[tensor.name]
        started = time.monotonic()
        while not ready.done():
            chunks = self._chunks
            await asyncio.wait({ready}, timeout=PATIENCE)
            if not ready.done() and self._chunks == chunks:
                log.info("no tensor received for %.0f s: the head sends the rest", PATIENCE)
                self._give_up()
                self._stop()
        self._waited += time.monotonic() - started
        self._read_ahead(tensor_key(tensor))
        file = ready.result()
        # A later tensor of that name would belong to another model.
        self._tensors.pop(tensor.name, None)
        try:
            placed = await asyncio.to_thread(
                self._cache.place,
                self._request.deployment,
                held.hash,
                tensor_key(tensor),
                tensor.size,
                file,
            )
        except OSError as error:
            log.info("%s is not offered to the worker: %s", tensor.name, error)
            return False
        self._filled += tensor.size if file is not None else 0
        return placed == tensor.size

    def _read_ahead(self, key: str) -> None:
        """Read ahead, since the worker is about to read the file of ``key``."""
        if self._kept is not None and (self._reading is None or self._reading.done()):
            self._reading = asyncio.create_task(asyncio.to_thread(self._kept.reached, key))

    def _count_chunk(self) -> None:
        """Count a chunk. Called in any thread: a lost increment is harmless."""
        self._chunks += 1

    def _stop(self) -> None:
        """Stop collecting tensors."""
        for stop in self._stops:
            stop.stop()
        if self._task is not None:
            self._task.cancel()

    def _give_up(self) -> None:
        for ready in self._files.values():
            if not ready.done():
                ready.set_result(None)

    async def _run(self) -> None:
        threads = ThreadPoolExecutor(
            _PARALLEL * (1 + len(self._request.sources)),
            thread_name_prefix="cache",
            initializer=lower_priority if self._local is not None else None,
        )
        try:
            folder = await asyncio.to_thread(self._cache.fill_folder, self._request.deployment)
            if folder is not None:
                await self._fill(folder, threads)
        except* (OSError, PeerError) as errors:
            reason = "; ".join(dict.fromkeys(map(str, errors.exceptions)))
            log.info("the worker's cache is not filled: %s", reason)
        except* Exception:
            log.exception("filling a worker's cache failed")
        finally:
            self._give_up()
            threads.shutdown(wait=False, cancel_futures=True)

    async def _fill(self, folder: Path, threads: ThreadPoolExecutor) -> None:
        request = self._request
        offered = await asyncio.to_thread(self._cache.offered, request.deployment, request.digest)
        kept, wanted = {}, []
        for tensor in tuple(self._tensors.values()):
            key = tensor_key(tensor)
            if key in offered:
                kept[key] = offered[key]
                self._set(tensor, None)
            else:
                wanted.append(tensor)
        self._kept = ReadAhead(kept)
        self._read_ahead("")
        if not wanted:
            return
        head_items = (await NodeSource(self._calls, request.head, request.digest).parcel()).items
        if self._local is not None:
            await self._from_disk(wanted, self._local, head_items, folder, threads)
        else:
            await self._from_nodes(wanted, head_items, folder, threads)

    # From a copy on this machine

    async def _from_disk(
        self,
        wanted: Sequence[WantedTensor],
        model: Model,
        head_items: tuple[Item, ...],
        folder: Path,
        threads: ThreadPoolExecutor,
    ) -> None:
        own_items = await in_thread(threads, items_of, model)
        self._whole = frozenset(
            index
            for index, (a, b) in enumerate(zip(own_items, head_items, strict=False))
            if a.sha256 and a.sha256 == b.sha256
        )
        paths = paths_of(model)
        remaining = deque(wanted)

        async def copy() -> None:
            stop = Stop()
            self._stops.append(stop)
            while remaining:
                tensor = remaining.popleft()
                file = folder / self._numbers[tensor.name]
                try:
                    source, matches = paths[tensor.file], True
                    if tensor.file in self._whole:
                        span = (tensor.start, tensor.size)
                        await in_thread(
                            threads, tensor_copy.copy_bytes, source, *span, file, stop, self._count_chunk
                        )
                    else:
                        digest = partial(
                            tensor_copy.copy_and_digest, source, tensor.start, file, stop, self._count_chunk
                        )
                        matches = await self._matches_head(tensor, digest, threads)
                except (OSError, IndexError) as error:
                    log.info("%s can't be copied from %s: %s", tensor.name, model.name, error)
                    self._set(tensor, None)
                else:
                    self._finish(tensor, file, matches)

        await _run_all([copy() for _ in range(_PARALLEL)])

    # From other nodes

    async def _from_nodes(
        self,
        wanted: Sequence[WantedTensor],
        head_items: tuple[Item, ...],
        folder: Path,
        threads: ThreadPoolExecutor,
    ) -> None:
        nodes = [node for node in self._request.sources if await self._has_the_same(node, head_items)]
        if not set(nodes) - {self._request.head}:
            return  # The head would send it just as fast.
        chunks = deque(
            (tensor, start, min(start + tensor_copy.CHUNK_BYTES, tensor.start + tensor.size))
            for tensor in wanted
            for start in range(tensor.start, tensor.start + tensor.size, tensor_copy.CHUNK_BYTES)
        )
        remaining = {tensor.name: -(-tensor.size // tensor_copy.CHUNK_BYTES) for tensor in wanted}

        async def fetch_from(source: BlockingSource) -> None:
            stop = Stop()
            self._stops.append(stop)
            failures = 0
            while chunks and failures < _MAX_FAILURES:
                tensor, start, end = chunk = chunks.popleft()
                file = folder / self._numbers[tensor.name]
                try:
                    await in_thread(threads, tensor_copy.fetch_chunk, source, tensor, start, end, file, stop)
                except (SourceError, OSError) as error:
                    log.info("%s: %s", tensor.name, error)
                    chunks.appendleft(chunk)
                    failures += 1
                    continue
                failures = 0
                self._count_chunk()
                remaining[tensor.name] -= 1
                if not remaining[tensor.name]:
                    digest = partial(tensor_copy.digest_file, file, tensor.start)
                    self._finish(tensor, file, await self._matches_head(tensor, digest, threads))

        sources = [self._connect(node, self._request.digest) for node in nodes]
        try:
            await _run_all([fetch_from(source) for source in sources for _ in range(_PARALLEL)])
        finally:
            for source in sources:
                source.close()

    async def _has_the_same(self, node: str, head_items: tuple[Item, ...]) -> bool:
        """Return whether a node answers and its files of the model have the same sizes as the head's."""
        with contextlib.suppress(PeerError):
            items = (await NodeSource(self._calls, node, self._request.digest).parcel()).items
            return [item.size for item in items] == [item.size for item in head_items]
        return False

    # Both

    def _finish(self, tensor: WantedTensor, file: Path, matches: bool) -> None:
        """Mark a tensor as ready, with its file if that matches the head's data."""
        if not matches:
            log.warning("%s: the local copy differs from the head's, which is used instead", tensor.name)
        self._set(tensor, file if matches else None)

    async def _matches_head(
        self, tensor: WantedTensor, digest: Callable[[int, int, str], str], threads: ThreadPoolExecutor
    ) -> bool:
        """Return whether a tensor equals the head's. ``digest``: (start, end, key) → digest; blocks."""
        request, end = self._request, tensor.start + tensor.size
        for start in range(tensor.start, end, LARGEST):
            part_end = min(start + LARGEST, end)
            part = PartDigestRequest(request.digest, tensor.file, start, part_end)
            local_digest = partial(in_thread, threads, partial(digest, start, part_end))
            if not await same_bytes(partial(self._head_digest, part), local_digest):
                return False
            self._count_chunk()
        return True

    async def _head_digest(self, part: PartDigestRequest, key: str) -> PartHash:
        keyed = replace(part, key=key)
        return await self._calls.call(self._request.head, "part", keyed, PartHash, timeout=_TIMEOUT)

    def _set(self, tensor: WantedTensor, file: Path | None) -> None:
        ready = self._files[tensor.name]
        if not ready.done():
            ready.set_result(file)


def tensor_key(tensor: WantedTensor) -> str:
    """Return a tensor's key in the cache index."""
    return f"{tensor.file}:{tensor.start}:{tensor.size}"


async def _run_all(work: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run them concurrently; a failure cancels the others."""
    async with asyncio.TaskGroup() as group:
        for coroutine in work:
            group.create_task(coroutine)
