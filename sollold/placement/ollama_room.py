"""How large a model the Ollama of a machine could take. Pure.

Ollama asks no ledger: it takes what is free, and makes room among its own models that are idle.
"""

from __future__ import annotations

from sollold.cluster.record import Backend, Record
from sollold.machine.device import Kind, one_a_memory

UNKNOWN = 1 << 62
"""Bytes where nothing is measured yet: nothing speaks against it."""


def ollama_room(record: Record) -> int:
    """Bytes over all memories of the node, as its record has it; deployments keep what they were granted."""
    own = [device for device in record.devices if device.kind is not Kind.PLAIN]
    if not own:
        return UNKNOWN
    free = sum(device.free for device in one_a_memory(own, lambda device: device.free))
    total = sum(device.total for device in one_a_memory(own, lambda device: device.total))
    granted = sum(device.granted for device in own)
    loaded = [one for one in record.endpoints if one.backend is Backend.OLLAMA and one.loaded]
    busy = sum(one.bytes for one in loaded if one.active or one.waiting)
    idle = sum(one.bytes for one in loaded) - busy
    # Mapped weights count as free to the system, so what is free alone would count a busy model's too.
    return max(0, min(free + idle, total - granted - busy))
