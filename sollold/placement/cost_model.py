"""How long a token takes: the speed model. Seconds and bytes throughout.

Decoding is bound by memory: each device reads the weights that are active for a token once, so a layer
costs its active bytes divided by the device's bandwidth. Each device behind a worker adds one blocking
round trip per token, in turn, all through the head (measured; see `sollold.placement.cost_model.WORKER`),
with the hidden state going out and coming back, and the logits too where the output is remote.
Reading a prompt is bound by computing: two operations a weight and token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from sollold.facts import dataclass
from sollold.machine.device import Kind
from sollold.placement.inventory import DeviceCapacity, Link

WORKER = 0.0004
"""Seconds that a worker's device adds to a token besides the network: measured on loopback with a tiny
model (459 to 387 tokens per second with a second worker)."""

LOOPBACK = Link(round_trip=0.00003, bandwidth=2e9)
"""To a worker on the head itself."""

ASSUMED_BANDWIDTH = {Kind.GPU: 300e9, Kind.CPU: 20e9, Kind.EXTERNAL: 20e9}
"""Bytes per second where nothing is known: a modest GPU, two channels of DDR4. A plain
worker does not say what it computes on."""

ASSUMED_COMPUTE = {Kind.GPU: 10e12, Kind.CPU: 0.2e12, Kind.EXTERNAL: 0.2e12}

DISK = 500e6
"""Bytes per second from disk, of a SATA SSD: no disk is measured."""

Correction = Callable[[str, str], float]
"""(node, device) → measured time divided by predicted time; 1.0 where nothing was measured."""


HOP = "hop"
"""In a `Correction`, instead of a device: the round trip to a node's worker."""


def uncorrected(node: str, device: str) -> float:
    """Take the devices' own figures as they are."""
    return 1.0


def seconds_per_byte(capacity: DeviceCapacity, correction: Correction = uncorrected) -> float:
    """Seconds to read one active byte of weights while decoding."""
    bandwidth = capacity.bandwidth if capacity.bandwidth > 0 else ASSUMED_BANDWIDTH[capacity.kind]
    return correction(capacity.node, capacity.device) / bandwidth


def hop_seconds(link: Link, width: int) -> float:
    """Seconds that a worker's device adds to each token: a round trip with the hidden state both ways.

    Args:
        link: from the head to the worker.
        width: values of the hidden state (n_embd), 4 bytes each.
    """
    return WORKER + link.round_trip + 2 * width * 4 / link.bandwidth


def logits_seconds(link: Link, vocabulary: int) -> float:
    """Seconds more where the output matrix is remote: 4 bytes a word of the vocabulary."""
    return vocabulary * 4 / link.bandwidth


@dataclass(frozen=True, slots=True)
class Part:
    """What one device of a plan does, for predicting: ``link`` None where the head computes itself."""

    capacity: DeviceCapacity
    active: int
    weights: int
    link: Link | None
    output: bool


def decode_seconds(
    parts: Sequence[Part], width: int, vocabulary: int, correction: Correction = uncorrected
) -> float:
    """Seconds per generated token of one stream."""
    total = 0.0
    for part in parts:
        total += part.active * seconds_per_byte(part.capacity, correction)
        if part.link is not None:
            hop = hop_seconds(part.link, width)
            if part.output:
                hop += logits_seconds(part.link, vocabulary)
            total += hop * correction(part.capacity.node, HOP)
    return total


def batch_seconds(
    parts: Sequence[Part],
    width: int,
    vocabulary: int,
    tokens: int,
    parameters_per_byte: float,
    correction: Correction = uncorrected,
) -> float:
    """Seconds for a batch of so many tokens of one stream, of each of which the result is wanted.

    The weights are read once, and computed with for each further token; measured on a processor, where that
    is most: batches of 2 to 33 tokens took within a quarter of it. Experts may differ from token to token.
    The trips are as many as for one token, and carry more.

    Args:
        parameters_per_byte: of the weights, more than 0.0.
    """
    total = 0.0
    for part in parts:
        slower = correction(part.capacity.node, part.capacity.device)
        compute = part.capacity.compute if part.capacity.compute > 0 else ASSUMED_COMPUTE[part.capacity.kind]
        read = min(max(part.weights, part.active), tokens * part.active)
        total += read * seconds_per_byte(part.capacity, correction)
        total += (tokens - 1) * 2 * part.active * parameters_per_byte / compute * slower
        if part.link is not None:
            hop = hop_seconds(part.link, width * tokens)
            if part.output:
                hop += logits_seconds(part.link, vocabulary * tokens)
            total += hop * correction(part.capacity.node, HOP)
    return total


def prefill_seconds(parts: Sequence[Part], width: int, parameters_per_byte: float) -> float:
    """Seconds per token of a long prompt, the devices one after the other.

    Args:
        parts: the plan's devices.
        width: n_embd; 4 bytes a value cross each hop both ways.
        parameters_per_byte: of the weights, from the model's parameter count and size; 0.0: not known, and
            so is the answer.
    """
    total = 0.0
    if parameters_per_byte <= 0:
        return total
    for part in parts:
        compute = part.capacity.compute if part.capacity.compute > 0 else ASSUMED_COMPUTE[part.capacity.kind]
        total += 2 * part.active * parameters_per_byte / compute
        if part.link is not None:
            total += 2 * width * 4 / part.link.bandwidth
    return total


def load_seconds(parts: Sequence[Part], host_bytes: int, cached: Mapping[str, int]) -> float:
    """Seconds from start to ready: every byte is read from disk, the remote ones sent after another.

    llama.cpp loads tensor by tensor, so that reading and sending do not overlap much. The head reads what a
    worker has kept, too, to name it; the worker then reads it from its own disk instead of the network.

    Args:
        parts: the plan's devices.
        host_bytes: that stay with the head's processor.
        cached: node → bytes of the model on its disk.
    """
    total = host_bytes / DISK
    left = dict(cached)
    for part in parts:
        total += part.weights / DISK
        if part.link is not None:
            kept = min(left.get(part.capacity.node, 0), part.weights)
            left[part.capacity.node] = left.get(part.capacity.node, 0) - kept
            total += (part.weights - kept) / part.link.bandwidth + kept / DISK
    return total
