"""Reads the headers of this node's models on request; concurrent requests share one read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sollold.bounded import BoundedDict
from sollold.models.footprint.adapters import with_adapters, with_projector
from sollold.models.footprint.read_shape import shape_of
from sollold.models.footprint.shape import Shape
from sollold.models.gguf import reader
from sollold.models.gguf.header import Array, Header
from sollold.models.gguf.long_arrays import long_arrays
from sollold.models.model import Model
from sollold.models.stores.patient_read import PATIENCE, no_answer
from sollold.models.stores.threads import in_own_thread

_MAX_SHAPES = 8

T = TypeVar("T")


class HeaderReader:
    """Reads the headers of models that have files here; shapes are cached by content."""

    def __init__(self, changed: Callable[[], None]) -> None:
        """``changed``: called when `silent` has changed."""
        self._changed = changed
        self._shapes: BoundedDict[str, Shape] = BoundedDict(_MAX_SHAPES)
        self._reads: dict[str, asyncio.Future[Any]] = {}
        self._silent: dict[str, Path] = {}

    @property
    def silent(self) -> frozenset[Path]:
        """Folders in which a read has timed out and not ended yet."""
        return frozenset(self._silent.values())

    async def shape(self, model: Model) -> Shape:
        """Return the shape of a model with its projector and adapters, for the footprint.

        Raises:
            GgufError: its files can't be read.
            LookupError: reading them timed out.
        """
        shape = self._shapes.get(model.digest)
        if shape is None:
            shape = await self._read(
                f"shape {model.digest}", lambda: shape_of(reader.read_files(model.files)), model.files[0]
            )
            if model.projector:
                shape = with_projector(shape, await self._header_of(model.projector))
            shape = with_adapters(shape, [await self._header_of(path) for path in model.adapters])
            self._shapes[model.digest] = shape
        return shape

    async def header(self, model: Model) -> Header:
        """Return the header of a model's files.

        Raises:
            GgufError, LookupError: as `shape`.
        """
        return await self._read(
            f"header {model.digest}", lambda: reader.read_files(model.files), model.files[0]
        )

    async def metadata(self, model: Model, *, whole: bool = False) -> dict[str, object]:
        """Return the header's key-value pairs, including the projector's (``clip.…``).

        ``whole``: include the values of long arrays, which otherwise are empty.

        Raises:
            GgufError, LookupError: as `shape`.
        """
        key = f"{'whole ' if whole else ''}metadata {model.digest}"
        pairs = dict(await self._read(key, lambda: _metadata(model, whole), model.files[0]))
        if model.projector:
            projector = await self._header_of(model.projector)
            pairs |= {key: value for key, value in _pairs(projector).items() if key.startswith("clip.")}
            pairs["clip.parameter_count"] = sum(tensor.elements for tensor in projector.tensors)
        return pairs

    async def _header_of(self, path: str) -> Header:
        """Return the header of a projector or an adapter, which may be on another share than the weights."""
        return await self._read(f"header {path}", lambda: reader.read(path), path)

    async def _read(self, key: str, work: Callable[[], T], path: str) -> T:
        """Return the result of ``work`` on a file (or shards); concurrent requests for the same share it.

        Once it has timed out, further requests fail at once.
        """
        reading = self._reads.get(key)
        if reading is None:
            reading = self._reads[key] = in_own_thread(work, name=f"read {path}")
            reading.add_done_callback(lambda _: self._ended(key))
        folder = Path(path).parent
        if key not in self._silent:
            try:
                async with asyncio.timeout(PATIENCE):
                    return await asyncio.shield(reading)
            except TimeoutError:
                if not reading.done():
                    self._silent[key] = folder
                    self._changed()
        raise LookupError(no_answer(folder))

    def _ended(self, key: str) -> None:
        self._reads.pop(key, None)
        if self._silent.pop(key, None):
            self._changed()


def _metadata(model: Model, whole: bool) -> dict[str, object]:
    header = reader.read_files(model.files)
    pairs = _pairs(header)
    if whole:
        pairs |= long_arrays(header)
    return pairs


def _pairs(header: Header) -> dict[str, object]:
    pairs: dict[str, object] = {}
    for key, value in header.metadata.items():
        if not isinstance(value, Array):
            pairs[key] = value
        else:
            pairs[key] = list(value.values or ())
    return pairs
