"""What a placement is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from sollold.cluster.record import Asked
from sollold.config import PlacementSettings

MOST_DEVICES = 15
"""llama.cpp takes no more in one model (GGML_SCHED_MAX_BACKENDS less the processor's)."""


class Policy(StrEnum):
    """How layers are shared out."""

    FASTEST = "fastest"
    """Least predicted time per token."""
    MEMORY_AWARE = "memory_aware"
    """The roomiest devices that hold it, in proportion to their room."""
    EVEN = "even"
    """The fewest devices that hold it, with layers as equal in number as can be."""
    SPREAD = "spread"
    """All devices, in proportion to their room: the most room is left on each."""


@dataclass(frozen=True, slots=True)
class Wish:
    """A model to be placed, and how it shall run.

    Attributes:
        parameters, size: count of weights and bytes of the files; 0 when unknown.
        context: tokens a slot that the caller named; 0: none, take the largest that fits up to
            ``usual`` and ``context_train``.
        slots: requests at a time; fewer are given before it is refused.
        workers: most machines besides the head.
        distributed: it may be spread over several machines; ``always``: it must be.
        fixed: (node's id or name, count of layers) that the user fixed, in layer order; the output is one.
        devices: (node, device) that the user allows; empty: all.
        head: the node that must be the head; empty: any that has the file.
    """

    model: str
    digest: str
    parameters: int = 0
    size: int = 0
    context: int = 0
    usual: int = 8192
    slots: int = 4
    type_k: str = "f16"
    type_v: str = "f16"
    ubatch: int = 512
    policy: Policy = Policy.FASTEST
    workers: int = MOST_DEVICES
    distributed: bool = True
    always: bool = False
    fixed: tuple[tuple[str, int], ...] = ()
    devices: tuple[tuple[str, str], ...] = ()
    head: str = ""
    embedding: bool = False

    @property
    def asked(self) -> Asked:
        """What of it a later caller may want otherwise."""
        return Asked(
            self.slots,
            self.type_k,
            self.type_v,
            self.policy.value,
            self.workers,
            tuple(pair for pair in self.fixed if pair[1]),
        )


def must_shard(settings: PlacementSettings, parameters: int) -> bool:
    """Whether the settings want a model of so many weights spread, even where it fits one machine."""
    return settings.enable_distributed and 0 < settings.distributed_threshold <= parameters / 1e9
