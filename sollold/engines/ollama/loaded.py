"""Ollama's loaded models: on which devices, and whether in use by us or by other clients."""

from __future__ import annotations

import contextlib
from collections.abc import Collection

from sollold.cluster.gossip.record import OLLAMA_PREFIX, Placed, Record
from sollold.engines.ollama.api import Loaded
from sollold.facts import dataclass
from sollold.machine.device import PROCESSOR, Kind
from sollold.models.model import Model
from sollold.models.names import canonical

RESIDENT_STEP = 64 * 1024**2
"""Granularity of a runner's memory in bytes: it changes all the time, and is gossiped to all nodes."""
_RECENT_SECONDS = 5.0
"""Seconds for which a model counts as in use after another client has used it."""


@dataclass(slots=True)
class ModelUse:
    """Our own requests to one model."""

    inside: int = 0
    active: int = 0
    waiting: int = 0
    speed: float = 0.0
    last: float = 0.0


@dataclass(slots=True)
class _InMemory:
    """A model that Ollama has loaded; ``touched``: when its expiry last moved."""

    loaded: Loaded
    touched: float


class LoadedModels:
    """Tracks ``/api/ps`` and counts our own requests. Times are the event loop's."""

    def __init__(self) -> None:
        self._uses: dict[str, ModelUse] = {}
        self._models: dict[str, _InMemory] = {}
        self._seen = False

    def update(self, loaded: list[Loaded], now: float) -> None:
        """Process a response of ``/api/ps``. A model whose expiry has moved was used by a client."""
        new = now if self._seen else 0.0
        self._seen = True
        models: dict[str, _InMemory] = {}
        for model in loaded:
            with contextlib.suppress(ValueError):
                name = canonical(model.name).lower()
                before = self._models.get(name)
                same = before is not None and before.loaded.expires_at == model.expires_at
                models[name] = _InMemory(model, before.touched if before and same else now if before else new)
        self._models = models

    def clear(self) -> None:
        """Forget all loaded models: Ollama is gone."""
        self._models, self._seen = {}, False

    def get(self, name: str) -> Loaded | None:
        """Return the model of this canonical name if it is loaded."""
        found = self._models.get(name.lower())
        return found.loaded if found is not None else None

    def own_use(self, endpoint: str) -> ModelUse:
        """Return our use of an endpoint, for updating."""
        return self._uses.setdefault(endpoint, ModelUse())

    def use_of(self, endpoint: str) -> ModelUse:
        """Return our use of an endpoint, for reading."""
        return self._uses.get(endpoint) or ModelUse()

    def forget_unused(self, endpoints: Collection[str]) -> None:
        """Drop endpoints not in ``endpoints``, except those with requests of ours still in them."""
        self._uses = {id: use for id, use in self._uses.items() if use.inside or id in endpoints}

    def in_use(self, name: str, now: float) -> bool:
        """Return whether a model has requests of ours or was used by others a moment ago."""
        use = self.use_of(OLLAMA_PREFIX + name)
        if use.inside or use.active or use.waiting:
            return True
        found = self._models.get(name.lower())
        return found is not None and now - found.touched < _RECENT_SECONDS


def placement(
    me: Record, loaded: Loaded, model: Model | None, resident: int | None = None
) -> tuple[Placed, ...]:
    """Return on which devices a model is.

    Ollama tells how much is on GPUs, but not on which: the one with the least free memory is assumed.

    ``resident``: bytes of RAM that its runner holds, here rounded up to `RESIDENT_STEP`; None: unknown.
    """
    last = (model.layers if model else 0) + 1
    gpus = sorted((d for d in me.devices if d.kind is Kind.GPU), key=lambda d: (d.free, d.id))
    on_gpu = min(max(0, loaded.size_vram), loaded.size) if gpus else 0
    placed = []
    if on_gpu:
        placed.append(Placed(me.node, gpus[0].id, 0, last, on_gpu))
    if loaded.size > on_gpu:
        in_ram = loaded.size - on_gpu
        known = -1 if resident is None else -(-resident // RESIDENT_STEP) * RESIDENT_STEP
        placed.append(Placed(me.node, PROCESSOR, 0, last if not on_gpu else 0, in_ram, known))
    return tuple(placed)
