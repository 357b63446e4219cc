"""What a placement is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from sollold.cluster.gossip.record import MTP, NGRAM, Asked
from sollold.facts import dataclass
from sollold.models.names import canonical
from sollold.settings.schema import ModelProfile, PlacementSettings

MOST_DEVICES = 15
"""llama.cpp takes no more in one model (GGML_SCHED_MAX_BACKENDS less the processor's)."""


OFF, AUTO = "off", "auto"
"""Of `PlacementRequest.speculation`: no tokens are drafted; or in whatever way pays."""
_SPECULATION = (OFF, AUTO, NGRAM, MTP)


def names_drafter(speculation: str) -> bool:
    """Whether it is a draft model's name, and no other way to draft."""
    return speculation not in ("", *_SPECULATION)


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
class PlacementRequest:
    """A model to be placed, and how it shall run: what was named, the rest from the settings and the file.

    Flat, and no `Asked` with more beside it: plans with one field changed are compared (`explain`).

    Attributes:
        parameters, size: count of weights and bytes of the files; 0 when unknown.
        context: tokens a slot that the caller named; 0: none, take the largest that fits up to
            ``usual`` and ``context_train``.
        slots: requests at a time; fewer are given before it is refused.
        workers: most machines besides the head.
        distributed: it may be spread over several machines; ``always``: it must be.
        template: Ollama's TEMPLATE that the engine applies; empty: the file's own.
        speculation: whether and how tokens are drafted, as ``placement.speculation`` in the settings.
        external: addresses of the external workers that may be used; None: all.
        fixed: (node's id or name, count of layers) that the user fixed, in layer order; the output is one.
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
    external: tuple[str, ...] | None = None
    fixed: tuple[tuple[str, int], ...] = ()
    embedding: bool = False
    template: str = ""
    speculation: str = OFF

    @property
    def asked(self) -> Asked:
        """What of it a later caller may want otherwise, for the record."""
        return Asked(
            self.slots,
            self.type_k,
            self.type_v,
            self.policy.value,
            self.workers,
            tuple(pair for pair in self.fixed if pair[1]),
            self.context or self.usual,
            self.always,
            self.speculation,
        )


def speculation_meant(text: str) -> str:
    """What a person means who wants tokens drafted so: case counts no more than in models' names."""
    word = text.strip()
    return word.lower() if word.lower() in _SPECULATION else word


def must_shard(settings: PlacementSettings, parameters: int) -> bool:
    """Whether the settings want a model of so many weights spread, even where it fits one machine."""
    return settings.enable_distributed and 0 < settings.distributed_threshold <= parameters / 1e9


_BYTES_A_WEIGHT = 0.7
"""Of the usual 4-bit quantizations, context and buffers included."""


def profile_of(profiles: Mapping[str, ModelProfile], name: str) -> ModelProfile | None:
    """The profile of a model, however its name is written; None when the settings have none."""
    wanted = _plain(name)
    return next((profile for known, profile in profiles.items() if _plain(known) == wanted), None)


def needed(profile: ModelProfile) -> int:
    """Bytes that the model takes, guessed from its weights where the profile does not say; 0: not known."""
    return profile.memory or int(profile.parameters * 1e9 * _BYTES_A_WEIGHT)


def _plain(name: str) -> str:
    try:
        return canonical(name).lower()
    except ValueError:
        return name.lower()
