"""Keeps samples of the last hour by second and the last day by minute, in arrays of fixed size. Pure."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import field

from sollold.facts import dataclass

HOUR = 3600
"""Number of one-second samples kept."""
DAY = 1440
"""Number of one-minute samples kept."""
MOST_SERIES = 200
"""Maximum number of series: devices come and go with settings and drivers."""
MOST_POINTS = 3600
NONE = float("nan")
"""Marks a missing value."""

TOTALS = (
    "tokens_per_second",
    "prompt_tokens_per_second",
    "requests_per_second",
    "failed_per_second",
    "active",
    "waiting",
)
"""A node's series that are summed over nodes; its other one, ``first_token_seconds``, is averaged."""
FIRST_TOKEN = "first_token_seconds"


class _Ring:
    """The per-second and per-minute samples of one series."""

    __slots__ = ("minutes", "seconds")

    def __init__(self) -> None:
        self.seconds = array("f", [NONE]) * HOUR
        self.minutes = array("f", [NONE]) * DAY


@dataclass(frozen=True, slots=True)
class HistoryRequest:
    """Peer method ``history``: return the last ``seconds`` in points of ``step`` seconds each."""

    seconds: int
    step: int


@dataclass(frozen=True, slots=True)
class NodeHistory:
    """One node's history; each list has the oldest point first, and NaN for missing values.

    Attributes:
        series: the node's own series, by name.
        devices: series by device: ``used_bytes``, ``granted_bytes``, and for a GPU whose load can be read
            ``utilization``, ``temperature_celsius``, ``power_watts``.
    """

    node: str
    name: str
    series: dict[str, list[float]] = field(default_factory=dict)
    devices: dict[str, dict[str, list[float]]] = field(default_factory=dict)


class History:
    """Stores one sample per second, in about 20 kB per series."""

    def __init__(self) -> None:
        self._rings: dict[tuple[str, str], _Ring] = {}
        self._count = 0
        """Number of samples so far; the newest is at ``(count - 1) % HOUR``."""

    def add(self, values: Mapping[tuple[str, str], float]) -> None:
        """Add the values of one second, by (device or an empty string, series)."""
        second = self._count % HOUR
        for key in values:
            if key not in self._rings and len(self._rings) < MOST_SERIES:
                self._rings[key] = _Ring()
        for key, ring in self._rings.items():
            ring.seconds[second] = values.get(key, NONE)
        self._count += 1
        if self._count % 60 == 0:
            self._end_minute()

    def _end_minute(self) -> None:
        index = (self._count // 60 - 1) % DAY
        end = (self._count - 1) % HOUR + 1
        empty: list[tuple[str, str]] = []
        for key, ring in self._rings.items():
            ring.minutes[index] = mean(ring.seconds[end - 60 : end])
            if index == DAY - 1 and all(math.isnan(value) for value in ring.minutes):
                empty.append(key)
        for key in empty:
            del self._rings[key]

    def read(self, node: str, name: str, request: HistoryRequest) -> NodeHistory:
        """Return the last ``request.seconds``, averaged over each ``request.step``."""
        series: dict[str, list[float]] = {}
        devices: dict[str, dict[str, list[float]]] = {}
        for (device, key), ring in self._rings.items():
            points = self._points(ring, request)
            if device:
                devices.setdefault(device, {})[key] = points
            else:
                series[key] = points
        return NodeHistory(node, name, series, devices)

    def _points(self, ring: _Ring, request: HistoryRequest) -> list[float]:
        if request.seconds <= HOUR:
            values, count, step = ring.seconds, self._count, request.step
        else:
            values, count, step = ring.minutes, self._count // 60, max(1, request.step // 60)
        wanted = request.seconds // request.step
        # Buckets end at multiples of the step, so that the next response has the same ones.
        end = count - count % step
        points = []
        for index in range(wanted):
            begin = end - (wanted - index) * step
            points.append(_mean_between(values, begin, begin + step, count))
        return points


def _mean_between(values: array[float], begin: int, end: int, count: int) -> float:
    """Return the mean of samples ``begin`` to ``end - 1``, of which only the last ``len(values)`` exist."""
    size = len(values)
    begin = max(begin, 0, count - size)
    if end - begin == 1:
        return values[begin % size]
    if begin >= end:
        return NONE
    first, last = begin % size, (end - 1) % size + 1
    return mean(values[first:last] if first < last else values[first:] + values[:last])


def mean(values: Iterable[float]) -> float:
    """Return the mean of the values that are not NaN; NaN when there are none."""
    total, count = 0.0, 0
    for value in values:
        if value == value:
            total += value
            count += 1
    return total / count if count else NONE


def bounded_request(seconds: int, step: int) -> HistoryRequest:
    """Return a request within bounds: at most a day and `MOST_POINTS`, in whole minutes beyond an hour.

    If ``step`` is 0, it is chosen to give about 300 points.
    """
    seconds = min(max(seconds, 10), DAY * 60)
    if not step:
        step = max(1, seconds // 300)
    if seconds > HOUR:
        step = max(60, step - step % 60)
    step = min(max(step, -(-seconds // MOST_POINTS)), seconds)
    return HistoryRequest(seconds - seconds % step, step)


def totals(nodes: Iterable[NodeHistory], points: int) -> dict[str, list[float]]:
    """Return the series of the whole cluster: sums, and the mean time to the first token."""
    found = list(nodes)
    total: dict[str, list[float]] = {}
    for name in (*TOTALS, FIRST_TOKEN):
        line = []
        for index in range(points):
            values = [
                value
                for node in found
                if index < len(samples := node.series.get(name, ())) and (value := samples[index]) == value
            ]
            if name == FIRST_TOKEN:
                line.append(mean(values))
            else:
                line.append(sum(values) if values else NONE)
        total[name] = line
    return total
