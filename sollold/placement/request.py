"""Defines a placement request: a model, and how it should run."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from sollold.cluster.gossip.record import MTP, NGRAM, Asked
from sollold.facts import dataclass
from sollold.models.names import canonical
from sollold.settings.schema import ModelProfile, PlacementSettings

MOST_DEVICES = 15
"""llama.cpp's maximum number of devices per model (GGML_SCHED_MAX_BACKENDS less the processor's)."""


OFF, AUTO = "off", "auto"
"""Values of `PlacementRequest.speculation`: draft no tokens; draft in the way predicted to pay most."""
_SPECULATION = (OFF, AUTO, NGRAM, MTP)


def names_drafter(speculation: str) -> bool:
    """Return whether the value is a draft model's name."""
    return speculation not in ("", *_SPECULATION)


class Policy(StrEnum):
    """How layers are distributed over devices."""

    FASTEST = "fastest"
    """Least predicted time per token."""
    MEMORY_AWARE = "memory_aware"
    """The fewest, roomiest devices that hold the model, in proportion to their room."""
    EVEN = "even"
    """The fewest devices that hold the model, with layer counts as equal as possible."""
    SPREAD = "spread"
    """All devices, in proportion to their room, which leaves the most room on each."""


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """A model to place, and how it should run: what the caller named, else from the settings and the file.

    The fields are flat rather than an `Asked` inside, since `explain` tries requests with one field changed.

    Attributes:
        parameters, size: number of weights, and bytes of the files; 0 when unknown.
        context: tokens per slot that the caller named; 0: none, so take the largest that fits, up to
            ``usual`` and ``context_train``.
        slots: concurrent requests; fewer are given before the model is refused.
        workers: maximum number of machines besides the head.
        distributed: whether it may be spread over several machines; ``always``: whether it must be.
        template: Ollama's TEMPLATE that the engine applies; empty: the file's own.
        speculation: whether and how tokens are drafted, as ``placement.speculation`` in the settings.
        external: addresses of the external workers that may be used; None: all.
        fixed: (node id or name, number of layers) pairs that the user fixed, in layer order; the output
            counts as a layer.
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
        """The settings that a later caller may want to differ, for the record."""
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


def normalised_speculation(text: str) -> str:
    """Normalise a user's speculation setting: its keywords are case-insensitive, as model names are."""
    word = text.strip()
    return word.lower() if word.lower() in _SPECULATION else word


def must_shard(settings: PlacementSettings, parameters: int) -> bool:
    """Return whether the settings want a model of this size spread, even if it fits on one machine."""
    return settings.enable_distributed and 0 < settings.distributed_threshold <= parameters / 1e9


_BYTES_A_WEIGHT = 0.7
"""Bytes per weight of the usual 4-bit quantizations, context and buffers included."""


def profile_of(profiles: Mapping[str, ModelProfile], name: str) -> ModelProfile | None:
    """Return the profile of a model, however its name is written; None when the settings have none."""
    key = _key(name)
    return next((profile for known, profile in profiles.items() if _key(known) == key), None)


def memory_needed(profile: ModelProfile) -> int:
    """Return the bytes that the model takes, estimated if the profile has only its size; 0 when unknown."""
    return profile.memory or int(profile.parameters * 1e9 * _BYTES_A_WEIGHT)


def _key(name: str) -> str:
    try:
        return canonical(name).lower()
    except ValueError:
        return name.lower()
