"""Validates records: plausible values, in amounts that cannot exhaust other nodes' memory."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import fields
from functools import lru_cache
from ipaddress import ip_address
from typing import Any

from sollold.cluster.gossip.packet import RECORD_LIMIT, encode
from sollold.cluster.gossip.record import Record
from sollold.cluster.gossip.term import Term, follows

MAX_BYTES = 2**50
"""1 PiB: more than any machine has."""
MAX_DEVICES = 64
MAX_NAME = 64
_MAX_LIMIT = 2**62
"""Maximum `Device.limit`, which comes from the settings and may be far above what the device has."""
_MAX_TEXT = 16 * 1024
_MAX_ITEMS = 1024
_MAX_FLOAT = 1e18
_MAX_ADDRESSES = 16


def printable_name(name: str) -> str:
    """Return ``name`` without control characters, cut to `MAX_NAME` characters."""
    return "".join(letter for letter in name if letter.isprintable())[:MAX_NAME]


def objection(record: Record, highest: Term, known: Collection[str] = ()) -> str:
    """Return why no honest node has such a record; empty if it is plausible.

    Args:
        highest: the highest term seen so far: claims rise in small steps.
        known: fields that are unchanged from an accepted record.
    """
    claim = record.claim
    if claim.leader not in ("", record.node) or (claim.counter and not claim.leader):
        return "it claims a term for another node"
    if not follows(claim, highest):
        return f"it claims term {claim.counter}, but the highest is {highest.counter}"
    if not record.name or record.name != printable_name(record.name):
        return f"its name must have 1 to {MAX_NAME} printable characters"
    if len(record.devices) > MAX_DEVICES:
        return f"it has {len(record.devices)} devices"
    if len(record.addresses) > _MAX_ADDRESSES or not all(map(is_ip, record.addresses)):
        return "its addresses are not IP addresses"
    for port in (record.http_port, record.peer_port):
        if not 0 <= port <= 65535:
            return f"{port} is not a port"
    return _bad_field(record, known)


def oversize(record: Record) -> str:
    """Return why other nodes reject a record because of its size; empty if they accept it."""
    return "it is too large" if len(encode(record)) > RECORD_LIMIT else ""


def bad_value(value: Any, name: str = "", minimum: int = 0) -> str:
    """Return what is wrong with a value, or with one inside a tuple or dataclass; empty: nothing.

    ``minimum``: least value of an integer.
    """
    if value is None or value is True or value is False or name in ("version", "claim"):
        return ""
    if isinstance(value, str):
        if len(value) > _MAX_TEXT:
            return f"{name} has {len(value)} characters"
    elif isinstance(value, int):
        if not minimum <= value <= (_MAX_LIMIT if name == "limit" else MAX_BYTES):
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
    for name, minimum in _checked_fields(kind):
        if name not in known and (why := bad_value(getattr(value, name), name, minimum)):
            return why
    return ""


@lru_cache
def _checked_fields(kind: Any) -> tuple[tuple[str, int], ...]:
    """Return the fields of a dataclass, each with its minimum if it is an integer."""
    return tuple(
        # A default below zero means "not known".
        (field.name, min(0, field.default if isinstance(field.default, int) else 0))
        for field in fields(kind)
    )


@lru_cache(4096)
def is_ip(host: str) -> bool:
    """Whether ``host`` is an IP literal. A host name would have to be looked up at the sender's will."""
    try:
        ip_address(host)
        # The scope of an IPv6 address may be any text here, but not for `socket.getaddrinfo`, which would
        # raise an error that no caller expects.
        host.encode("idna")
    except ValueError:
        return False
    return True
