"""How large a model the Ollama of a machine could take. Pure.

Ollama asks no ledger: it takes what is free, and makes room among its own models that are idle.
"""

from __future__ import annotations

from collections import defaultdict

from sollold.cluster.record import Backend, Record
from sollold.machine.device import Kind

UNKNOWN = 1 << 62
"""Bytes where nothing is measured yet: nothing speaks against it."""


def ollama_room(record: Record) -> int:
    """Bytes over all memories of the node, as its record has it; deployments keep what they were granted."""
    free: dict[str, int] = defaultdict(int)
    total: dict[str, int] = defaultdict(int)
    granted = 0
    for device in record.devices:
        if device.kind is not Kind.PLAIN:
            memory = device.pool or device.id
            free[memory] = max(free[memory], device.free)
            total[memory] = max(total[memory], device.total)
            granted += device.granted
    if not total:
        return UNKNOWN
    loaded = [one for one in record.endpoints if one.backend is Backend.OLLAMA and one.loaded]
    busy = sum(one.bytes for one in loaded if one.active or one.waiting)
    idle = sum(one.bytes for one in loaded) - busy
    # Mapped weights count as free to the system, so what is free alone would count a busy model's too.
    return max(0, min(sum(free.values()) + idle, sum(total.values()) - granted - busy))
