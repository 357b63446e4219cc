"""What a record may say: values that a machine can have, in amounts that do not grow the others."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import fields
from functools import lru_cache
from ipaddress import ip_address
from typing import Any

from sollold.cluster.gossip.record import Record
from sollold.cluster.gossip.term import Term, follows

MAX_BYTES = 2**50
"""1 PiB: more than any machine has."""
MAX_DEVICES = 64
MAX_NAME = 64
_MAX_LIMIT = 2**62
"""Of a device, from the settings: may be far above what the device has."""
_MAX_TEXT = 16 * 1024
_MAX_ITEMS = 1024
_MAX_FLOAT = 1e18
_MAX_ADDRESSES = 16


def printable_name(name: str) -> str:
    """``name`` as a record may carry it: without control characters, at most `MAX_NAME` characters."""
    return "".join(letter for letter in name if letter.isprintable())[:MAX_NAME]


def objection(record: Record, highest: Term, known: Collection[str] = ()) -> str:
    """Why no honest node has such a record; empty when it may be one.

    Args:
        highest: the highest term seen so far: claims go up by few at a time.
        known: fields that are as they were in a record that was found right.
    """
    claim = record.claim
    if claim.leader not in ("", record.node) or (claim.counter and not claim.leader):
        return "it claims a term for another node"
    if not follows(claim, highest):
        return f"it claims term {claim.counter}, where {highest.counter} is the highest"
    if not record.name or record.name != printable_name(record.name):
        return f"a name has at most {MAX_NAME} printable characters"
    if len(record.devices) > MAX_DEVICES:
        return f"{len(record.devices)} devices"
    if len(record.addresses) > _MAX_ADDRESSES or not all(map(is_ip, record.addresses)):
        return "its addresses are not IP addresses"
    for port in (record.http_port, record.peer_port):
        if not 0 <= port <= 65535:
            return f"{port} is not a port"
    return _bad_field(record, known)


def bad_value(value: Any, name: str = "", least: int = 0) -> str:
    """What is wrong with a value of a node's, or with one that a tuple or a dataclass holds; empty: nothing.

    ``least``: what a whole number may be.
    """
    if value is None or value is True or value is False or name in ("version", "claim"):
        return ""
    if isinstance(value, str):
        if len(value) > _MAX_TEXT:
            return f"{name} has {len(value)} characters"
    elif isinstance(value, int):
        if not least <= value <= (_MAX_LIMIT if name == "limit" else MAX_BYTES):
            return f"{name} is {value}"
    elif isinstance(value, float):
        if not math.isfinite(value) or abs(value) > _MAX_FLOAT:
            return f"{name} is {value}"
    elif isinstance(value, tuple):
        if len(value) > _MAX_ITEMS:
            return f"{name} has {len(value)} entries"
        for item in value:
            if why := bad_value(item, name):
                return why
    else:
        return _bad_field(value)
    return ""


def _bad_field(value: Any, known: Collection[str] = ()) -> str:
    kind: Any = type(value)
    for name, least in _checked_fields(kind):
        if name not in known and (why := bad_value(getattr(value, name), name, least)):
            return why
    return ""


@lru_cache
def _checked_fields(kind: Any) -> tuple[tuple[str, int], ...]:
    """The fields of a dataclass, each with what it may be at least if it is a whole number."""
    return tuple(
        # A default below zero stands for "not known".
        (field.name, min(0, field.default if isinstance(field.default, int) else 0))
        for field in fields(kind)
    )


@lru_cache(4096)
def is_ip(host: str) -> bool:
    """Whether ``host`` is an IP literal. A name would have to be looked up, by the sender's wish."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
