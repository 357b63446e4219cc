"""Corrects the speed model with measured generation times. Pure.

A deployment's measured time per token is compared with the time predicted for it. The ratio corrects every
device that took part and the hop to each worker, all by the same factor. Corrections are kept per device and
architecture, since a device reads some kinds of weights faster than others. A missing one is taken from other
architectures on the same device, else from other devices of the same kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isfinite, sqrt

from sollold.bounded import BoundedDict
from sollold.facts import dataclass
from sollold.placement.cost_model import Correction

MOST = 2048
"""Maximum number of devices whose corrections are kept."""
LIMIT = 50.0
"""Largest plausible correction; one above it or below its inverse is a measuring error and is ignored."""


@dataclass(frozen=True, slots=True)
class Factor:
    """Measured time divided by predicted time, for a node's device (or `cost_model.HOP`) and architecture."""

    node: str
    device: str
    architecture: str
    factor: float


@dataclass(frozen=True, slots=True)
class TimePart:
    """A device's part of a predicted time per token, uncorrected, in seconds."""

    node: str
    device: str
    seconds: float


class Calibration:
    """The factors that correct predicted times, by device and architecture."""

    def __init__(self, factors: Iterable[Factor] = ()) -> None:
        self._devices: BoundedDict[tuple[str, str], dict[str, Factor]] = BoundedDict(MOST)
        for factor in factors:
            if isfinite(factor.factor) and 1 / LIMIT <= factor.factor <= LIMIT:
                self._keep(factor)

    def factors(self) -> tuple[Factor, ...]:
        """Return all known factors, for storing on disk."""
        return tuple(factor for factors in self._devices.values() for factor in factors.values())

    def correction(self, architecture: str) -> Correction:
        """Return the corrections for models of this architecture, as known now."""
        by_kind: dict[str, list[float]] = {}
        exact: dict[tuple[str, str], float] = {}
        for (node, device), by_architecture in self._devices.items():
            exact[node, device] = factor = _factor_for(by_architecture, architecture)
            by_kind.setdefault(_kind_of(device), []).append(factor)
        # A device not measured yet gets the typical factor of its kind. Otherwise it would look better than
        # the measured ones (which may all be slower than their figures) just because it was never used.
        typical = {kind: _median(factors) for kind, factors in by_kind.items()}
        return lambda node, device: exact.get((node, device)) or typical.get(_kind_of(device), 1.0)

    def measured(self, architecture: str, terms: Sequence[TimePart], seconds: float) -> None:
        """Learn from a deployment made of ``terms`` that took ``seconds`` per token."""
        correction = self.correction(architecture)
        predicted = sum(term.seconds * correction(term.node, term.device) for term in terms)
        if not (isfinite(seconds) and seconds > 0 and predicted > 0):
            return
        ratio = seconds / predicted
        for node, device in dict.fromkeys((term.node, term.device) for term in terms if term.seconds > 0):
            previous = self._devices.get((node, device), {}).get(architecture)
            # The first measurement counts fully, later ones by half: they vary at random.
            change = ratio if previous is None else sqrt(ratio)
            factor = correction(node, device) * change
            if 1 / LIMIT <= factor <= LIMIT:
                self._keep(Factor(node, device, architecture, factor))

    def _keep(self, factor: Factor) -> None:
        key = factor.node, factor.device
        self._devices[key] = {**self._devices.get(key, {}), factor.architecture: factor}


def _factor_for(factors: dict[str, Factor], architecture: str) -> float:
    """Return a device's correction for an architecture: its own, else the median of the device's others."""
    if architecture in factors:
        return factors[architecture].factor
    return _median([factor.factor for factor in factors.values()])


def _median(values: list[float]) -> float:
    """Return the median, without `statistics`, which would import `fractions` and more into every daemon."""
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _kind_of(device: str) -> str:
    """Return a device's kind: the name without its number, so ``CUDA0`` and ``CUDA1`` are of one kind."""
    return device.rstrip("0123456789")
