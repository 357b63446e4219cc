"""External RPC workers, also called plain, since their protocol has no authentication or encryption.

A device of such a worker is named by the worker's address, which distinguishes it from the machine's own
devices in records, plans and grants.
"""

from __future__ import annotations

import re
from enum import StrEnum

from sollold.facts import dataclass

_ADDRESS = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9])?):([0-9]{1,5})")
_DEVICE = re.compile(r"([^#]+:[0-9]+)(?:#([0-9]{1,3})/([0-9]{1,3}))?")


class ExternalState(StrEnum):
    """Result of a probe of such a worker."""

    CHECKING = "checking"
    """Not probed yet, or not since a deployment released it."""
    USABLE = "usable"
    TAKEN = "taken"
    """A deployment of the cluster uses it: it is not probed meanwhile, since it serves one client."""
    BUSY = "busy"
    """It accepts connections but does not answer: it serves another client."""
    DEAD = "dead"
    """Nothing answers there."""
    REFUSED = "refused"
    """It answers but can't be used; the reason says why."""


@dataclass(frozen=True, slots=True)
class ExternalWorker:
    """What a node knows of an external worker.

    Attributes:
        address: ``host:port``.
        reason: why it is not used, as a sentence; empty if it is.
        version: its protocol version (``7.0.0``); empty while unknown.
        devices: number of its devices; ``total``: bytes of all of them, as reported by the worker.
    """

    address: str
    state: ExternalState
    reason: str = ""
    version: str = ""
    devices: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True)
class ExternalDevice:
    """Device number ``index`` (from 0) of the ``count`` devices of the worker at ``address``."""

    address: str
    index: int = 0
    count: int = 1

    @property
    def id(self) -> str:
        """``host:port``, or with several devices ``host:port#2/3`` for the second of three."""
        return self.address if self.count == 1 else f"{self.address}#{self.index + 1}/{self.count}"

    def all(self) -> tuple[str, ...]:
        """Return the ids of all devices of its worker, in the worker's order."""
        return tuple(ExternalDevice(self.address, index, self.count).id for index in range(self.count))


def external_device(device: str) -> ExternalDevice | None:
    """Return the external worker's device with this id; None for one of a machine's own."""
    found = _DEVICE.fullmatch(device)
    if found is None:
        return None
    if found[2] is None:
        return ExternalDevice(found[1])
    return ExternalDevice(found[1], int(found[2]) - 1, int(found[3]))


def external_address(device: str) -> str:
    """Return the address of the external worker that has this device; empty for one of a machine's own."""
    found = external_device(device)
    return found.address if found is not None else ""


def split_address(address: str) -> tuple[str, int]:
    """Split an address into host and port.

    Raises:
        ValueError: it is not ``host:port`` with a name or an IPv4 address, the only forms llama.cpp accepts.
    """
    found = _ADDRESS.fullmatch(address)
    if found is None or not 0 < int(found[2]) < 65536:
        raise ValueError(f"{address!r} is not HOST:PORT")
    return found[1], int(found[2])
