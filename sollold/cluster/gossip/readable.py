"""Decodes what this release understands of a record written by another release. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any, get_args, get_type_hints

import msgspec
from msgspec import Raw

from sollold.cluster.gossip.record import Record

OTHER_RELEASE = "it runs another release of sollold; upgrade all nodes to the same"


def readable_record(parts: Mapping[str, bytes], node: str, version: int) -> tuple[Record, tuple[str, ...]]:
    """Return the record without unknown values, and the names of the fields that have such.

    No work is placed on such a node: it is treated like one without llama.cpp. Its endpoints that are
    understood stay usable.

    Raises:
        ValueError: a field needed by all releases is not understood.
    """
    kept: dict[str, Any] = {}
    unread = []
    for name, kind in _kinds().items():
        if name in ("node", "version") or name not in parts:
            continue
        try:
            kept[name] = _decoded(parts[name], kind)
        except ValueError:
            if name == "claim":
                raise  # the election needs a claim that all releases understand
            unread.append(name)
            if get_args(kind)[1:] == (Ellipsis,):
                kept[name] = _known_items(parts[name], get_args(kind)[0])
    try:
        record = Record(node=node, version=version, **kept)
    except TypeError as error:
        raise ValueError(str(error)) from None
    return replace(record, build="", setup=OTHER_RELEASE), tuple(unread)


@cache
def _kinds() -> dict[str, Any]:
    return get_type_hints(Record)  # slow, and such a node sends its record often


def _known_items(data: bytes, kind: Any) -> tuple[Any, ...]:
    found = []
    try:
        items: list[Raw] = _decoded(data, list[Raw])
    except ValueError:
        return ()
    for item in items:
        try:
            found.append(_decoded(bytes(item), kind))
        except ValueError:
            continue
    return tuple(found)


def _decoded(data: bytes, kind: Any) -> Any:
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(str(error)) from None
