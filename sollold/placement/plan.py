"""Defines a plan: which layers of a model go to which devices of which nodes."""

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
        weights: bytes of tensors.
        state: bytes of KV cache and recurrent state.
        compute: bytes of compute buffers.
        overhead: bytes of the process and its loading peak.
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
        """Number of layers, counting the output as one."""
        return self.last - self.first

    @property
    def total(self) -> int:
        """Bytes to reserve."""
        return self.weights + self.state + self.compute + self.overhead


@dataclass(frozen=True, slots=True)
class Plan:
    """Where a model will run. The head carries it out; other nodes see only the endpoint in its record.

    Attributes:
        model: canonical name of the model; ``digest``: digest of its content.
        head: node id of the node that runs ``llama-server``.
        layers: the model's block count L.
        host: what stays with the head's own processor: the token embedding, host buffers and, when
            ``host.layers`` is not 0, the first layers of the model. Its device is ``CPU``.
        shares: the offloaded layers in ``--device`` order, which is layer order; may be empty.
        asked: the requested settings; ``template``: Ollama's TEMPLATE to apply, empty: the file's own.
        cpu_moe: number of first layers whose experts stay with the head's processor while the rest of the
            layer is offloaded; ``host`` counts their bytes.
        tokens_per_second, load_seconds: predictions; 0.0 when unknown.
        estimate: whether the architecture is unknown, so that the bytes are conservative estimates.
        reasons: sentences for users: why this placement, and what was given.
        drafts_by: what drafts tokens, as in `Drafts`, ``run.drafts`` of them at a time; empty: no drafts.
        windowed: whether some layers use sliding-window attention.
        draft_digest: digest of the draft model, if one is used; ``draft_device``: the head's device on which
            it computes. The shares include its bytes.
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
        """``--tensor-split``: one layer count per device; they sum to ``gpu_layers``."""
        return tuple(share.layers for share in self.shares)

    @property
    def gpu_layers(self) -> int:
        """``-ngl``: how many of the L + 1 layers are offloaded from the head's own processor."""
        return sum(self.tensor_split)

    @property
    def projector_device(self) -> str:
        """The head's first GPU that holds layers; it computes the projector. Empty: the processor does."""
        own = (share.device for share in self.shares if share.node == self.head)
        return next((device for device in own if device != PROCESSOR and not external_address(device)), "")

    def bytes_by_owner(self) -> dict[str, dict[str, int]]:
        """Return the bytes to reserve by node and device, including the host's share."""
        owners: dict[str, dict[str, int]] = {}
        for share in (self.host, *self.shares):
            devices = owners.setdefault(share.node, {})
            devices[share.device] = devices.get(share.device, 0) + share.total
        return owners
