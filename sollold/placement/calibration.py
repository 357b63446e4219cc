"""What real answers say about the speed model. Pure.

A deployment's measured time per token is compared with what would have been predicted for it. The ratio
corrects each device that took part, by its share of the predicted time, and the hops of each worker. It is
kept by device and architecture, since a device reads some kinds of weights faster than others; what is not
known yet is taken from other architectures on the same device, else from other devices of its sort.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from math import isfinite, sqrt

from sollold.facts import dataclass
from sollold.placement.cost_model import Correction

MOST = 2048
"""Devices whose corrections are kept."""
LIMIT = 50.0
"""A correction beyond this factor or below its inverse is a fault of measuring, and not taken."""


@dataclass(frozen=True, slots=True)
class Factor:
    """Measured time divided by predicted, of a node's device (or ``speed.HOP``), for an architecture."""

    node: str
    device: str
    architecture: str
    factor: float


@dataclass(frozen=True, slots=True)
class TimePart:
    """A part of a predicted time per token, without any correction: seconds."""

    node: str
    device: str
    seconds: float


class Calibration:
    """The factors by which predicted times are corrected, by device and architecture."""

    def __init__(self, factors: Iterable[Factor] = ()) -> None:
        self._devices: OrderedDict[tuple[str, str], dict[str, Factor]] = OrderedDict()
        for one in factors:
            if isfinite(one.factor) and 1 / LIMIT <= one.factor <= LIMIT:
                self._keep(one)

    def factors(self) -> tuple[Factor, ...]:
        """All that is known, to be kept on disk."""
        return tuple(one for known in self._devices.values() for one in known.values())

    def correction(self, architecture: str) -> Correction:
        """The corrections for a model of this architecture, as known now."""
        alike: dict[str, list[float]] = {}
        exact: dict[tuple[str, str], float] = {}
        for (node, device), known in self._devices.items():
            exact[node, device] = factor = _of(known, architecture)
            alike.setdefault(_sort(device), []).append(factor)
        # What holds for every device seen (all of them are slower than their figures, say) is taken to hold
        # for one not seen yet: else it would look better than it is, just because it was never used.
        usual = {sort: _middle(factors) for sort, factors in alike.items()}
        return lambda node, device: exact.get((node, device)) or usual.get(_sort(device), 1.0)

    def measured(self, architecture: str, terms: Sequence[TimePart], seconds: float) -> None:
        """A deployment made of ``terms`` took ``seconds`` per token."""
        correction = self.correction(architecture)
        predicted = sum(term.seconds * correction(term.node, term.device) for term in terms)
        if not (isfinite(seconds) and seconds > 0 and predicted > 0):
            return
        ratio = seconds / predicted
        for node, device in dict.fromkeys((term.node, term.device) for term in terms if term.seconds > 0):
            before = self._devices.get((node, device), {}).get(architecture)
            # The first answer is believed wholly, later ones by half: they differ by chance alone.
            change = ratio if before is None else sqrt(ratio)
            factor = correction(node, device) * change
            if 1 / LIMIT <= factor <= LIMIT:
                self._keep(Factor(node, device, architecture, factor))

    def _keep(self, one: Factor) -> None:
        key = one.node, one.device
        known = self._devices.setdefault(key, {})
        known[one.architecture] = one
        self._devices.move_to_end(key)
        while len(self._devices) > MOST:
            self._devices.popitem(last=False)


def _of(known: dict[str, Factor], architecture: str) -> float:
    """A device's correction for an architecture: its own, else what is usual on the device."""
    if architecture in known:
        return known[architecture].factor
    return _middle([one.factor for one in known.values()])


def _middle(values: list[float]) -> float:
    """The median. `statistics` would bring fractions and more into every daemon."""
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _sort(device: str) -> str:
    """``CUDA0`` and ``CUDA1`` are of one sort."""
    return device.rstrip("0123456789")
