"""A plan: which layers of a model go to which devices of which nodes."""

from __future__ import annotations

from dataclasses import field

from sollold.cluster.gossip.record import Asked
from sollold.facts import dataclass
from sollold.machine.device import PROCESSOR
from sollold.machine.external_worker import external_address
from sollold.models.footprint.run_options import Run


@dataclass(frozen=True, slots=True)
class Share:
    """The layers that one device holds, and the bytes they take there.

    Layers ``first`` to ``last - 1``; the output matrix counts as layer L (the model's block count),
    so the share that ends the model has ``last == L + 1``.

    Attributes:
        weights, state, compute, overhead: bytes: tensors; KV and recurrent state; compute buffers;
            process and loading peak.
    """

    node: str
    device: str
    first: int
    last: int
    weights: int
    state: int
    compute: int
    overhead: int = 0

    @property
    def layers(self) -> int:
        """How many layers, the output counted as one."""
        return self.last - self.first

    @property
    def total(self) -> int:
        """Bytes to be granted."""
        return self.weights + self.state + self.compute + self.overhead


@dataclass(frozen=True, slots=True)
class Plan:
    """Where a model will run. Carried out by the head; kept in no place but the head's record.

    Attributes:
        model: canonical name; ``digest``: its content.
        head: node id of the one that runs ``llama-server``.
        layers: the model's block count L.
        host: what stays with the head's own processor: the token embedding, host buffers and, when
            ``host.layers`` is not 0, the first layers of the model. Device ``CPU``.
        shares: the offloaded layers in ``--device`` order, which is layer order; may be empty.
        asked: how it was asked to run; ``template``: Ollama's TEMPLATE to be applied, empty: the file's own.
        cpu_moe: of so many first layers the experts stay with the head's processor, though they are offloaded
            otherwise; their bytes are the host's.
        tokens_per_second, load_seconds: predicted; 0.0 when unknown.
        estimate: the model's architecture is not known, so the bytes are estimates on the safe side.
        reasons: sentences for a person: why so, what was given.
        drafts_by: what drafts tokens, as in `Drafts`, ``run.drafts`` of them at a time; empty: nothing does.
        windowed: the attention of some layers slides over a window.
        draft_digest: content of the draft model, where one does, and ``draft_device``: of the head, on which
            it computes; its bytes are in the shares.
    """

    model: str
    digest: str
    head: str
    layers: int
    run: Run
    host: Share
    shares: tuple[Share, ...]
    cpu_moe: int = 0
    estimate: bool = False
    tokens_per_second: float = 0.0
    load_seconds: float = 0.0
    reasons: tuple[str, ...] = ()
    asked: Asked = field(default_factory=Asked)
    template: str = ""
    drafts_by: str = ""
    draft_digest: str = ""
    draft_device: str = ""
    windowed: bool = False

    @property
    def tensor_split(self) -> tuple[int, ...]:
        """``--tensor-split``: integer counts, one a device, that sum to ``gpu_layers``."""
        return tuple(share.layers for share in self.shares)

    @property
    def gpu_layers(self) -> int:
        """``-ngl``: how many of the L + 1 layers leave the head's own processor."""
        return sum(self.tensor_split)

    @property
    def projector_device(self) -> str:
        """The head's first GPU that holds layers, which computes the projector; empty: its processor does."""
        own = (share.device for share in self.shares if share.node == self.head)
        return next((device for device in own if device != PROCESSOR and not external_address(device)), "")

    def bytes_by_owner(self) -> dict[str, dict[str, int]]:
        """Bytes to reserve, node → device → bytes, the host's share included."""
        owners: dict[str, dict[str, int]] = {}
        for share in (self.host, *self.shares):
            devices = owners.setdefault(share.node, {})
            devices[share.device] = devices.get(share.device, 0) + share.total
        return owners
