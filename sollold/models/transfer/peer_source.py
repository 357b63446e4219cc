"""Transfers models from node to node, over the node port.

Peer method ``parcel`` (`ReadPartRequest` → `ModelFiles`) lists the files of a model, ``part``
(`PartDigestRequest` → `PartHash`) returns the digest of a piece of one; the raw route ``GET
/models/{digest}/{index}`` returns bytes of one, selected by a ``Range`` header.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
from collections.abc import AsyncGenerator
from pathlib import Path

from aiohttp import web

from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_client import RpcClient
from sollold.cluster.net.rpc_server import RpcServer
from sollold.errors import system_reason
from sollold.facts import dataclass
from sollold.models.model import Model
from sollold.models.stores.catalogue import Catalogue
from sollold.models.stores.patient_threads import PatientThreads
from sollold.models.stores.threads import lower_priority
from sollold.models.transfer.file_digest import digest_between
from sollold.models.transfer.part_check import LARGEST, PartDigestRequest, PartHash
from sollold.models.transfer.partial_file import Item
from sollold.models.transfer.rate_limit import RateLimit

log = logging.getLogger("sollold.models")

_PIECE = 1 << 20
_THREADS = 8
_DIGESTS = 4
"""Maximum number of concurrent digests."""
_TIMEOUT = 15.0
_IDLE = 30.0
_RANGE = re.compile(r"bytes=(\d{1,18})-(\d{1,18})")
_OLLAMA_BLOB = re.compile(r"sha256[-:]([0-9a-f]{64})")
_HUB_BLOB = re.compile(r"[0-9a-f]{64}")
"""Blob name of a large file in Hugging Face's cache; small files have git hashes, of 40 digits."""


@dataclass(frozen=True, slots=True)
class ReadPartRequest:
    """Requests the files of the model with this content digest."""

    digest: str


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model and its files as they should be stored: shards, projector, adapters.

    ``hashes``: the node provides digests of parts; older releases do not.
    """

    model: Model
    items: tuple[Item, ...]
    hashes: bool = False


def paths_of(model: Model) -> tuple[str, ...]:
    """Return the paths of all files of a model, in the order of `items_of`."""
    return (*model.files, *((model.projector,) if model.projector else ()), *model.adapters)


def items_of(model: Model) -> tuple[Item, ...]:
    """Return a model's files under names that `sollold.models.stores.folders` understands. Blocks.

    Raises:
        OSError: a file is missing.
    """
    return tuple(_item(name, path) for name, path in zip(names_of(model), paths_of(model), strict=True))


def names_of(model: Model) -> list[str]:
    """Return the names of the files of a model, in the order of `paths_of`."""
    count = len(model.files)
    names = (
        ["model.gguf"] if count == 1 else [f"model-{k:05}-of-{count:05}.gguf" for k in range(1, count + 1)]
    )
    if model.projector:
        names.append("mmproj.gguf")
    return names + [f"adapter-{k}.gguf" for k in range(1, len(model.adapters) + 1)]


def _item(name: str, path: str) -> Item:
    return Item(name, Path(path).stat().st_size, _sha256_in_name(path))


def _sha256_in_name(path: str) -> str:
    """Return the sha256 in the file name that a store uses, with links resolved; empty elsewhere."""
    real = Path(os.path.realpath(path))
    if blob := _OLLAMA_BLOB.fullmatch(real.name):
        return blob[1]
    return real.name if real.parent.name == "blobs" and _HUB_BLOB.fullmatch(real.name) else ""


_Stamp = tuple[int, ...]
"""A file's size and other attributes that reveal its replacement."""


def _stamp(status: os.stat_result) -> _Stamp:
    return status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino


def _read(path: str, stamp: _Stamp, count: int, start: int) -> bytes:
    """Return bytes of a file, opened only for them: a blocked read holds no shared descriptor. Blocks.

    Raises:
        OSError: it can't be read, or has been changed or replaced.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        piece = os.pread(handle, count, start)
        if not piece or _stamp(os.fstat(handle)) != stamp:
            raise OSError(errno.ESTALE, "it was changed while it was being read", path)
        return piece
    finally:
        os.close(handle)


class Sender:
    """Serves the files of models to other nodes.

    Registers its methods and its route with ``server``; the owner must call `close`.
    """

    def __init__(self, catalogue: Catalogue, server: RpcServer, node: str, pace: RateLimit) -> None:
        self._threads = PatientThreads(_THREADS, "send")
        self._digests = PatientThreads(_DIGESTS, "digest", begin=lower_priority)
        self._catalogue = catalogue
        self._node = node
        self._pace = pace
        server.method("parcel", ReadPartRequest, self._parcel)
        server.method("part", PartDigestRequest, self._part)
        server.route("GET", "/models/{digest}/{index}", self._bytes)

    def close(self) -> None:
        """Stop the threads; transfers under way break off."""
        self._threads.close()
        self._digests.close()

    def end_idle_threads(self) -> None:
        """End the threads if nothing is being read."""
        self._threads.end_idle()
        self._digests.end_idle()

    def _usable(self, digest: str) -> Model | None:
        """Return a model of which the files may be sent: what is no model may be any file, linked as one."""
        model = self._catalogue.with_digest(digest)
        return None if model is None or model.unusable else model

    async def _parcel(self, caller: str, request: ReadPartRequest) -> ModelFiles:
        model = self._usable(request.digest)
        if model is None:
            raise PeerError(self._node, "the model is no longer on this node", transport=False)
        try:
            # One by one: the files may be on several shares, of which one may hang.
            items = [
                await self._threads.run(path, _item, name, path)
                for name, path in zip(names_of(model), paths_of(model), strict=True)
            ]
            return ModelFiles(model, tuple(items), hashes=True)
        except OSError as error:
            raise PeerError(
                self._node, f"{error.filename}: {system_reason(error)}", transport=False
            ) from None
        except LookupError as error:
            raise PeerError(self._node, str(error), transport=False) from None

    async def _part(self, caller: str, request: PartDigestRequest) -> PartHash:
        model = self._usable(request.digest)
        paths = paths_of(model) if model else ()
        fits = 0 <= request.start < request.end <= request.start + LARGEST
        if not 0 <= request.index < len(paths) or not fits:
            raise PeerError(self._node, "the model is no longer on this node", transport=False)
        path = paths[request.index]

        def read() -> PartHash:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                digest = digest_between(handle, request.start, request.end, request.key)
                return PartHash(gmac=digest) if request.key else PartHash(sha256=digest)
            finally:
                os.close(handle)

        try:
            return await self._digests.run(path, read)
        except ValueError as error:
            raise PeerError(self._node, str(error), transport=False) from None
        except OSError as error:
            raise PeerError(self._node, f"{path}: {system_reason(error)}", transport=False) from None
        except LookupError as error:
            raise PeerError(self._node, str(error), transport=False) from None

    async def _bytes(self, request: web.Request) -> web.StreamResponse:
        model = self._usable(request.match_info["digest"])
        paths = paths_of(model) if model else ()
        index = request.match_info["index"]
        wanted = _RANGE.fullmatch(request.headers.get("Range", ""))
        if not re.fullmatch(r"[0-9]{1,6}", index) or int(index) >= len(paths):
            raise web.HTTPNotFound(text="the model is no longer on this node")
        path = paths[int(index)]
        try:
            stamp = await self._threads.run(path, lambda: _stamp(Path(path).stat()))
        except OSError as error:
            raise web.HTTPNotFound(text=f"{path}: {system_reason(error)}") from None
        except LookupError as error:
            raise web.HTTPNotFound(text=str(error)) from None
        size = stamp[0]
        start, end = (int(wanted[1]), int(wanted[2]) + 1) if wanted else (0, size)
        if not 0 <= start < end <= size:
            raise web.HTTPRequestRangeNotSatisfiable(text=f"the file has {size} bytes")
        response = web.StreamResponse(status=206, headers={"Content-Type": "application/octet-stream"})
        response.content_length = end - start
        await response.prepare(request)
        if not await self._send(response, path, stamp, start, end) and request.transport is not None:
            # The only way to signal in the middle of a response that it is incomplete.
            request.transport.abort()
        return response

    async def _send(
        self, response: web.StreamResponse, path: str, stamp: _Stamp, start: int, end: int
    ) -> bool:
        """Send a range of a file; return whether it was sent completely.

        A file may be changed or removed meanwhile, and a disk disconnected.
        """
        loop = asyncio.get_running_loop()
        piece_size = self._pace.piece(_PIECE)
        while start < end:
            try:
                piece = await self._threads.run(path, _read, path, stamp, min(piece_size, end - start), start)
            except (OSError, LookupError) as error:
                log.warning("sending %s broke off: %s", path, error)
                return False
            if delay := self._pace.wait(len(piece), loop.time()):
                await asyncio.sleep(delay)
            await response.write(piece)
            start += len(piece)
        return True


class NodeSource:
    """Another node as a source of bytes."""

    patience = 0.0

    def __init__(self, calls: RpcClient, node: str, digest: str) -> None:
        self.name = f"node {node}"
        self._calls = calls
        self._node = node
        self._digest = digest

    async def parcel(self) -> ModelFiles:
        """Return the model and files that the node has.

        Raises:
            PeerError: it can't be reached, or no longer has the model.
        """
        return await self._calls.call(
            self._node, "parcel", ReadPartRequest(self._digest), ModelFiles, timeout=_TIMEOUT
        )

    async def read(self, index: int, start: int, end: int) -> AsyncGenerator[bytes]:
        """Yield bytes of one file, in order.

        Raises:
            PeerError: the node broke off, or no longer has the model.
        """
        headers = {"Range": f"bytes={start}-{end - 1}"}
        path = f"/models/{self._digest}/{index}"
        async with self._calls.stream(self._node, "GET", path, headers=headers, idle_timeout=_IDLE) as answer:
            if answer.status != 206:
                text = (await answer.content.read(300)).decode("utf-8", "replace")
                raise PeerError(
                    self._node, f"{self.name} gave status {answer.status}: {text}", transport=False
                )
            async for piece in answer.content.iter_any():
                yield piece
