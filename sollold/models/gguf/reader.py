"""Reads the header of a model from its file or files. All functions block: call them in a thread."""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path

from sollold.models.gguf.header import GgufError, Header, Tensor
from sollold.models.gguf.parse import Truncated, parse

_MAX_SHARDS = 4_096
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def read(path: str | Path) -> Header:
    """Read a model's header from its file; for a split model from any shard, its siblings found by name.

    Raises:
        GgufError: a file is malformed, truncated, missing, or can't be read.
    """
    return read_files(shards(path))


def read_files(paths: Sequence[str | Path]) -> Header:
    """Read the header of a model whose shards are these files, whatever their names and order.

    Raises:
        GgufError: as `read`; also when a shard is missing or two are of different models.
    """
    return joined([_read_one(str(path)) for path in paths])


def read_prefix(data: bytes, name: str, size: int) -> Header | None:
    """Parse a header from the first bytes of a file of ``size`` bytes; None if it extends beyond them.

    Raises:
        GgufError: it is malformed.
    """
    try:
        return parse(io.BytesIO(data), name, size)
    except Truncated:
        return None


def shards(path: str | Path) -> tuple[str, ...]:
    """Return the paths of all shards of the model that a file belongs to; only itself if it is not split.

    Raises:
        GgufError: the shard numbers in the name are out of range.
    """
    path = Path(path)
    match = _SHARD.fullmatch(path.name)
    if match is None:
        return (str(path),)
    count, number = int(match["count"]), int(match["number"])
    if not 1 <= count <= _MAX_SHARDS or not 1 <= number <= count:
        raise GgufError(str(path), 0, f"its name has an invalid shard number: {number} of {count}")
    return tuple(
        str(path.with_name(f"{match['stem']}-{index:05}-of-{count:05}.gguf")) for index in range(1, count + 1)
    )


def joined(headers: list[Header]) -> Header:
    """Merge the headers of a model's files, in any order.

    Raises:
        GgufError: a shard is missing, or two are of different models.
    """
    if len(headers) == 1 and headers[0].integer("split.count", 1) <= 1:
        return headers[0]
    first = headers[0].files[0]
    count = headers[0].integer("split.count")
    by_number: dict[int, Header] = {}
    for header in headers:
        number = header.integer("split.no", -1)
        if header.integer("split.count") != count or not 0 <= number < count:
            raise GgufError(header.files[0], 0, f"not a shard of the same model as {first}")
        if number in by_number:
            raise GgufError(header.files[0], 0, f"the same shard as {by_number[number].files[0]}")
        by_number[number] = header
    if len(by_number) != count:
        missing = next(number for number in range(count) if number not in by_number)
        raise GgufError(first, 0, f"shard {missing + 1} of {count} is missing; download the whole model")
    tensors: list[Tensor] = []
    seen: set[str] = set()
    for number in range(count):
        header = by_number[number]
        for tensor in header.tensors:
            if tensor.name in seen:
                raise GgufError(header.files[0], 0, f"tensor {tensor.name!r} is in two shards")
            seen.add(tensor.name)
            tensors.append(
                Tensor(tensor.name, tensor.shape, tensor.type, tensor.size, tensor.offset, file=number)
            )
    expected = by_number[0].integer("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise GgufError(first, 0, f"{len(tensors)} tensors in the shards, but the header declares {expected}")
    return Header(
        files=tuple(by_number[number].files[0] for number in range(count)),
        size=sum(header.size for header in headers),
        version=by_number[0].version,
        metadata=by_number[0].metadata,
        tensors=tuple(tensors),
    )


def _read_one(path: str) -> Header:
    try:
        # Without O_NONBLOCK a named pipe in the folder would block the caller forever.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise GgufError(path, 0, "not a file")
            return parse(file, path, status.st_size)
    except FileNotFoundError:
        raise GgufError(path, 0, "the file is missing; if the model is split, download all of it") from None
    except (OSError, ValueError) as error:
        raise GgufError(path, 0, f"can't be read: {error}") from None
