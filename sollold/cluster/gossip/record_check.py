"""What a record may say: values that a machine can have, in amounts that do not grow the others."""

from __future__ import annotations

import math
from collections.abc import Iterator
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


def objection(record: Record, highest: Term) -> str:
    """Why no honest node has such a record; empty when it may be one.

    Args:
        highest: the highest term seen so far: claims go up by few at a time.
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
    return next(bad_values(record), "")


def bad_values(value: Any, name: str = "", least: int = 0) -> Iterator[str]:
    """What is wrong with the numbers and texts in a record, or in another dataclass of a node's.

    ``least``: what a whole number may be.
    """
    if value is None or isinstance(value, bool) or name in ("version", "claim"):
        return
    if isinstance(value, int):
        if not least <= value <= (_MAX_LIMIT if name == "limit" else MAX_BYTES):
            yield f"{name} is {value}"
    elif isinstance(value, float):
        if not math.isfinite(value) or abs(value) > _MAX_FLOAT:
            yield f"{name} is {value}"
    elif isinstance(value, str):
        if len(value) > _MAX_TEXT:
            yield f"{name} has {len(value)} characters"
    elif isinstance(value, tuple):
        if len(value) > _MAX_ITEMS:
            yield f"{name} has {len(value)} entries"
            return
        for item in value:
            yield from bad_values(item, name)
    else:
        for field in fields(value):
            # A default below zero stands for "not known".
            unknown = field.default if isinstance(field.default, int) else 0
            yield from bad_values(getattr(value, field.name), field.name, min(0, unknown))


@lru_cache(4096)
def is_ip(host: str) -> bool:
    """Whether ``host`` is an IP literal. A name would have to be looked up, by the sender's wish."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
