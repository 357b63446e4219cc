"""The speed model: predicts how long tokens, prompts and loading take. Seconds and bytes throughout.

Decoding is memory-bound: each device reads the weights that are active for a token once, so a layer costs
its active bytes divided by the device's bandwidth. Each device behind a worker adds one blocking round trip
per token, one after the other and all through the head (measured; see `WORKER`): the hidden state goes out
and comes back, and so do the logits if the output is remote.
Reading a prompt is compute-bound: two operations per weight and token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from sollold.facts import dataclass
from sollold.machine.device import Kind
from sollold.placement.inventory import DeviceCapacity, Link

WORKER = 0.0004
"""Seconds that a worker's device adds to each token besides the network. Measured on loopback with a tiny
model (a second worker took it from 459 to 387 tokens per second)."""

LOOPBACK = Link(round_trip=0.00003, bandwidth=2e9)
"""The link to a worker on the head itself."""

ASSUMED_BANDWIDTH = {Kind.GPU: 300e9, Kind.CPU: 20e9, Kind.EXTERNAL: 20e9}
"""Bytes per second where nothing is known: a modest GPU, two channels of DDR4. An external worker does not
report what it computes on."""

ASSUMED_COMPUTE = {Kind.GPU: 10e12, Kind.CPU: 0.2e12, Kind.EXTERNAL: 0.2e12}

DISK = 500e6
"""Assumed disk bandwidth in bytes per second, that of a SATA SSD: disks are not measured."""

Correction = Callable[[str, str], float]
"""Maps (node, device) to measured time divided by predicted time; 1.0 where nothing was measured."""


HOP = "hop"
"""Used in a `Correction` in place of a device: the round trip to a node's worker."""


def uncorrected(node: str, device: str) -> float:
    """Apply no correction."""
    return 1.0


def seconds_per_byte(capacity: DeviceCapacity, correction: Correction = uncorrected) -> float:
    """Return the seconds to read one active byte of weights while decoding."""
    bandwidth = capacity.bandwidth if capacity.bandwidth > 0 else ASSUMED_BANDWIDTH[capacity.kind]
    return correction(capacity.node, capacity.device) / bandwidth


def hop_seconds(link: Link, width: int) -> float:
    """Return the seconds that a worker's device adds to each token: a round trip with the hidden state.

    Args:
        link: the link from the head to the worker.
        width: number of values in the hidden state (n_embd), 4 bytes each.
    """
    return WORKER + link.round_trip + 2 * width * 4 / link.bandwidth


def logits_seconds(link: Link, vocabulary: int) -> float:
    """Return the extra seconds per token if the output matrix is remote: 4 bytes per vocabulary entry."""
    return vocabulary * 4 / link.bandwidth


@dataclass(frozen=True, slots=True)
class Part:
    """One device's work in a plan, for predictions. ``link`` is None where llama-server itself computes."""

    capacity: DeviceCapacity
    active: int
    weights: int
    link: Link | None
    output: bool


def decode_seconds(
    parts: Sequence[Part], width: int, vocabulary: int, correction: Correction = uncorrected
) -> float:
    """Return the seconds per generated token of one stream."""
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
    correction: Correction,
) -> float:
    """Return the seconds for a batch of ``tokens`` of one stream when the logits of each are wanted.

    The weights are read once; each further token adds computing. On a processor, where computing counts most,
    batches of 2 to 33 tokens were measured within a quarter of this prediction. Experts may differ from token
    to token. The batch makes as many round trips as one token, with more data in each.

    Args:
        parameters_per_byte: parameters per byte of weights; must be more than 0.0.
    """
    total = 0.0
    for part in parts:
        slowdown = correction(part.capacity.node, part.capacity.device)
        compute = part.capacity.compute if part.capacity.compute > 0 else ASSUMED_COMPUTE[part.capacity.kind]
        read = min(max(part.weights, part.active), tokens * part.active)
        total += read * seconds_per_byte(part.capacity, correction)
        total += (tokens - 1) * 2 * part.active * parameters_per_byte / compute * slowdown
        if part.link is not None:
            hop = hop_seconds(part.link, width * tokens)
            if part.output:
                hop += logits_seconds(part.link, vocabulary * tokens)
            total += hop * correction(part.capacity.node, HOP)
    return total


def prefill_seconds(parts: Sequence[Part], width: int, parameters_per_byte: float) -> float:
    """Return the seconds per token of a long prompt, the devices working one after the other.

    Args:
        parts: the plan's devices.
        width: n_embd; 4 bytes per value cross each hop both ways.
        parameters_per_byte: parameters per byte of weights; 0.0 if unknown, and then 0.0 is returned.
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
    """Return the seconds from start to ready: the head reads every byte from disk and sends the remote ones.

    llama.cpp loads tensor by tensor, so reading and sending hardly overlap. The head reads cached tensors
    too, since it must hash them; the worker then loads them from its own disk instead of the network.

    Args:
        parts: the plan's devices.
        host_bytes: bytes that stay with the head's processor.
        cached: bytes of the model on each node's disk, by node.
    """
    total = host_bytes / DISK
    remaining = dict(cached)
    for part in parts:
        total += part.weights / DISK
        if part.link is not None:
            local = min(remaining.get(part.capacity.node, 0), part.weights)
            remaining[part.capacity.node] = remaining.get(part.capacity.node, 0) - local
            total += (part.weights - local) / part.link.bandwidth + local / DISK
    return total
