"""Decides on speculative decoding: some tokens are drafted, and the model checks them in one batch. Pure.

Drafts are added to a placement that was found without them, and use only memory that is left there. No layer
is moved for them, with one exception: if the model's own layer (MTP) should draft and does not fit beside the
last layers, all layers are split again over the same machines, provided these have room for everything.

Only tokens that the model itself would have produced are accepted. So drafts change the speed of an answer,
and its words only where a batch is rounded differently from a single token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from sollold.cluster.gossip.record import MTP, NGRAM
from sollold.facts import dataclass
from sollold.machine.device import Kind
from sollold.models.footprint.drafts_with_images import draft_model_reads_images, own_layer_reads_images
from sollold.models.footprint.footprint import Footprint, footprint
from sollold.models.footprint.run_options import Run
from sollold.models.footprint.shape import Shape
from sollold.placement import cost_model
from sollold.placement.evaluate import Candidate, evaluate
from sollold.placement.inventory import DeviceCapacity, Fleet, links_between
from sollold.placement.plan import Share
from sollold.placement.planner import choose
from sollold.placement.request import AUTO, OFF, PlacementRequest
from sollold.placement.speculation_gain import MTP_PRIOR, NGRAM_PRIOR, DraftStats, draft_prior, gain
from sollold.units import bytes_text

NGRAM_LENGTHS = (8, 16)
NGRAM_LOOKUP = 8
"""Number of last tokens that must occur earlier in the conversation for what followed to be drafted."""
DRAFT_LENGTHS = (2, 3, 4, 6, 8)
MTP_LENGTHS = (1, 2, 3)
WORTH = 1.1
"""Minimum expected speed-up for `AUTO` to enable drafts."""
FAST_ENOUGH = 100.0
"""Tokens per second above which `AUTO` enables no drafts: nobody reads faster."""

MeasuredDrafts = Callable[[str], DraftStats | None]
"""Returns the measured drafts for the model by a draft model (its digest), or by `NGRAM` or `MTP`."""


def nothing_measured(by: str) -> DraftStats | None:
    """Return None: for a planner without measurements."""
    return None


@dataclass(frozen=True, slots=True)
class Drafter:
    """A model that could draft, since it has the same vocabulary; ``nodes``: those that have its file."""

    name: str
    digest: str
    shape: Shape
    nodes: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Option:
    """A way to draft, worked out; ``gain`` is 0.0 when unknown."""

    candidate: Candidate
    gain: float
    words: str


def with_drafts(
    found: Candidate,
    request: PlacementRequest,
    fleet: Fleet,
    footprint_of: Callable[[Run], Footprint],
    drafters: Sequence[Drafter] = (),
    measured: MeasuredDrafts = nothing_measured,
    correction: cost_model.Correction = cost_model.uncorrected,
    no_drafter: str = "",
) -> tuple[Candidate, str]:
    """Add the requested speculation to a placement, where possible.

    Args:
        found: a placement on machines of ``fleet``.
        drafters: models that may draft: all that could, or the one that was named.
        no_drafter: why the named one can't draft, as a clause.

    Returns:
        The placement, and a sentence for users; empty when there is nothing to say.
    """
    mode = request.speculation
    auto = mode == AUTO
    if mode == OFF or request.embedding or (auto and found.alone):
        return found, ""
    if auto and found.seconds * FAST_ENOUGH < 1:
        return found, ""
    target = footprint_of(found.run)
    if reason := _obstacle(target):
        return found, _no_drafts(reason)
    search = _Search(found, request, fleet, footprint_of, measured, correction)
    if mode == MTP or (auto and target.predicted):
        search.by_own_layer()
    if target.recurrent and mode != MTP:
        search.refused.append(_RECURRENT)
    elif mode != MTP:
        for drafter in drafters if mode != NGRAM else ():
            search.by_model(drafter)
        if mode in (AUTO, NGRAM):
            search.by_ngrams()
        elif not drafters:
            search.refused.append(no_drafter or f"{mode} can't draft for it")
    best = max(search.options, key=lambda option: option.gain, default=None)
    if best is None:
        return found, _no_drafts(search.refused[0]) if search.refused else ""
    if auto and best.gain < WORTH:
        return found, _no_drafts(f"it would be {max(best.gain, 0.01):.2f} times as fast")
    expected = f": {best.gain:.2f} times as fast is expected" if best.gain else ""
    return best.candidate, f"{best.words}{expected}."


_RECURRENT = "its recurrent state would have to be copied for each draft"


def _no_drafts(reason: str) -> str:
    return f"No tokens are drafted: {reason}{'' if reason.endswith('?') else '.'}"


def _obstacle(target: Footprint) -> str:
    """Return why no tokens can be drafted for a model, as a clause; empty when they can."""
    return "its architecture is unknown" if target.estimate else ""


_READS_IMAGES = "it reads images, which llama.cpp can't combine with"


class _Search:
    """Collects the ways to draft for one placement; ``refused``: why some are impossible, as clauses."""

    def __init__(
        self,
        found: Candidate,
        request: PlacementRequest,
        fleet: Fleet,
        footprint_of: Callable[[Run], Footprint],
        measured: MeasuredDrafts,
        correction: cost_model.Correction,
    ) -> None:
        self._found = found
        self._request = request
        self._fleet = fleet
        self._footprint_of = footprint_of
        self._measured = measured
        self._correction = correction
        self.options: list[_Option] = []
        self.refused: list[str] = []

    def by_own_layer(self) -> None:
        """Try the model's own layer for next-token prediction, on the device that holds the last layer."""
        target = self._footprint_of(self._found.run)
        if not target.predicted:
            self.refused.append("it has no layer for next-token prediction by which llama.cpp can draft")
            return
        if target.projector and not own_layer_reads_images(target.architecture):
            self.refused.append(f"{_READS_IMAGES} drafts by its own layer")
            return
        if self._found.cpu_moe:
            self.refused.append(
                "experts stay with the head's processor, away from the layer that would draft"
            )
            return
        stats = self._measured(MTP) or MTP_PRIOR
        for length in MTP_LENGTHS:
            trial = self._with_length(length, predicts=True) or self._split_again(length)
            if trial is None:
                continue
            factor = self._gain(stats, length, trial, self._predicting(trial, length))
            share = next(
                (share for share in (*trial.shares, trial.host) if share.first < target.layers <= share.last),
                trial.host,
            )
            words = f"Up to {length} tokens at a time are drafted by the model's own MTP layer"
            words += f", on {self._fleet.name(share.node)} {share.device}"
            ratio = self._found.seconds / trial.seconds if trial.seconds > 0 else 1.0
            trial = replace(trial, drafts_by=MTP, gain=factor or 1.0)
            self.options.append(_Option(trial, factor * ratio, words))

    def _split_again(self, length: int) -> Candidate | None:
        """Split the layers again over the same machines so that the model's own draft layer fits too."""

        def footprint_of(run: Run) -> Footprint:
            return self._footprint_of(replace(run, drafts=length, predicts=True))

        nodes = set(self._found.nodes)
        fleet = Fleet(tuple(machine for machine in self._fleet.machines if machine.node in nodes))
        request = replace(self._request, always=not self._found.alone)
        trial = choose(request, fleet, footprint_of, self._correction).candidate
        if trial is None or trial.run != self._found.run:
            return None
        return replace(trial, run=replace(trial.run, drafts=length, predicts=True))

    def _predicting(self, trial: Candidate, length: int) -> float:
        """Return the seconds for the own layer to draft ``length`` tokens and read the checked ones."""
        target = self._footprint_of(trial.run)
        density = self._request.parameters / max(sum(target.weights), 1)
        last = trial.parts[-1]
        ends = [replace(last, active=target.predicted, weights=target.predicted, output=True)]
        if trial.shares and trial.shares[-1].first >= target.layers and len(trial.parts) > 1:
            # The output is on another device: one more round trip.
            ends.append(replace(trial.parts[-2], active=0, weights=0, output=False))
        single = cost_model.decode_seconds(ends, target.n_embd, target.n_vocab, self._correction)
        parts = [replace(part, output=False) for part in ends]
        return length * single + cost_model.batch_seconds(
            parts, target.n_embd, target.n_vocab, length + 1, density, self._correction
        )

    def by_ngrams(self) -> None:
        """Try drafts from repeats of the conversation's own text."""
        stats = self._measured(NGRAM) or NGRAM_PRIOR
        for length in NGRAM_LENGTHS:
            trial = self._with_length(length)
            if trial is None:
                continue
            words = f"Up to {length} tokens at a time are drafted from repeats of the conversation's own text"
            factor = self._gain(stats, length, trial, 0.0)
            self.options.append(_Option(replace(trial, drafts_by=NGRAM, gain=factor or 1.0), factor, words))

    def by_model(self, drafter: Drafter) -> None:
        """Try a draft model, on a GPU of the head that holds layers, or else on the head's processor."""
        head = self._found.head
        if head.node not in drafter.nodes:
            self.refused.append(f"{head.name} does not have the file of {drafter.name}")
            return
        run = replace(self._found.run, drafts=0, checkpoints=self._found.checkpoints, embedding=False)
        # A draft model is started without its own projector.
        draft = footprint(replace(drafter.shape, projector=0), run)
        if reason := _obstacle(draft) or (_RECURRENT if draft.recurrent else ""):
            self.refused.append(f"{drafter.name} can't draft: {reason}")
            return
        target = self._footprint_of(self._found.run)
        if target.projector and not draft_model_reads_images(target.architecture):
            self.refused.append(f"{_READS_IMAGES} drafts by {drafter.name}")
            return
        stats = self._measured(drafter.digest) or draft_prior(
            drafter.shape.parameters, self._request.parameters
        )
        for device in self._devices():
            options = [
                option
                for length in DRAFT_LENGTHS
                if (option := self._option(drafter, draft, device, length, stats))
            ]
            self.options += options
            if options:
                return

    def _devices(self) -> list[DeviceCapacity]:
        """Return the head's devices on which a draft model may run, the best first."""
        head = self._fleet.machine(self._found.head.node) or self._found.head
        held = {share.device for share in self._found.shares if share.node == head.node}
        gpus = [gpu for gpu in head.devices if gpu.kind is Kind.GPU and gpu.device in held]
        return sorted(gpus, key=lambda gpu: -gpu.bandwidth) + ([head.cpu] if head.cpu is not None else [])

    def _option(
        self, drafter: Drafter, draft: Footprint, device: DeviceCapacity, length: int, stats: DraftStats
    ) -> _Option | None:
        trial = self._with_length(length)
        if trial is None:
            return None
        trial = _with_draft_model(trial, draft, device)
        if memory := _overfull_memory(trial, self._fleet):
            self.refused.append(f"{drafter.name} does not fit on {memory} with it")
            return None
        active = sum(draft.active)
        token_seconds = active * cost_model.seconds_per_byte(device, self._correction)
        part = cost_model.Part(device, active, active, None, True)
        density = drafter.shape.parameters / active if active else 0.0
        # The draft model must also read the checked tokens: one more batch.
        checked = cost_model.batch_seconds(
            [part], draft.n_embd, draft.n_vocab, length + 1, density, self._correction
        )
        factor = self._gain(stats, length, trial, length * token_seconds + checked)
        trial = replace(
            trial,
            drafts_by=drafter.name,
            draft_digest=drafter.digest,
            draft_device=device.device,
            gain=factor or 1.0,
        )
        place = f"{trial.head.name} {device.device}"
        return _Option(
            trial, factor, f"Up to {length} tokens at a time are drafted by {drafter.name} on {place}"
        )

    def _with_length(self, length: int, *, predicts: bool = False) -> Candidate | None:
        """Return the placement with room for the logits of drafts of this length, if it fits."""
        run = replace(self._found.run, drafts=length, predicts=predicts)
        trial = reevaluated(self._found, run, self._request, self._fleet, self._footprint_of(run))
        if not trial.short:
            return trial
        worst = max(trial.short, key=lambda shortfall: shortfall.needed - shortfall.room)
        self.refused.append(
            f"that needs {bytes_text(worst.needed - worst.room)} more than is free on "
            f"{self._fleet.name(worst.node)} {worst.device}"
        )
        return None

    def _gain(self, stats: DraftStats, length: int, trial: Candidate, drafting: float) -> float:
        """Return the expected speed-up; 0.0 when the number of weights is unknown."""
        target = self._footprint_of(trial.run)
        density = self._request.parameters / max(sum(target.weights), 1)
        if density <= 0:
            return 0.0
        single, batch = (
            cost_model.batch_seconds(
                trial.parts, target.n_embd, target.n_vocab, tokens, density, self._correction
            )
            for tokens in (1, length + 1)
        )
        return gain(stats, length, single, batch, drafting)


def _with_draft_model(trial: Candidate, draft: Footprint, device: DeviceCapacity) -> Candidate:
    """Add a draft model's bytes to the head's shares."""
    layers = draft.layers + 1
    offered = trial.head.cpu is not None
    if device.kind is not Kind.GPU:
        compute = draft.host_compute(devices=1, offloaded=0) + draft.host_buffers
        return replace(
            trial, host=_enlarged(trial.host, draft.host_tensors(layers), sum(draft.state), compute)
        )
    compute = draft.host_compute(devices=1, offloaded=layers) + draft.host_buffers
    # A processor that is not offered can grant nothing.
    host = _enlarged(trial.host, draft.host_weights, 0, compute) if offered else trial.host
    gpu_compute = draft.compute(0, layers, devices=1, offloaded=layers)
    shares, placed = [], False
    for share in trial.shares:
        if not placed and (share.node, share.device) == (device.node, device.device):
            share, placed = _enlarged(share, sum(draft.weights), sum(draft.state), gpu_compute), True
        shares.append(share)
    return replace(trial, host=host, shares=tuple(shares))


def _enlarged(share: Share, weights: int, state: int, compute: int) -> Share:
    return replace(
        share, weights=share.weights + weights, state=share.state + state, compute=share.compute + compute
    )


def _overfull_memory(trial: Candidate, fleet: Fleet) -> str:
    """Return a memory of the head that would have to hold more than it can; empty when none would."""
    head = fleet.machine(trial.head.node) or trial.head
    taken: dict[tuple[str, str], int] = {}
    rooms: dict[tuple[str, str], int] = {}
    for share in (trial.host, *trial.shares):
        capacity = head.device_named(share.device) if share.node == head.node else None
        if capacity is not None:
            taken[capacity.memory] = taken.get(capacity.memory, 0) + share.total
            rooms[capacity.memory] = max(rooms.get(capacity.memory, 0), capacity.room)
    overfull = (memory for memory, size in taken.items() if size > rooms[memory])
    return next((f"{head.name} {device}" for _, device in overfull), "")


def reevaluated(
    found: Candidate, run: Run, request: PlacementRequest, fleet: Fleet, target: Footprint
) -> Candidate:
    """Return the same layers on the same devices with another run; ``short`` says where it does not fit."""
    weights = sum(target.weights)
    head = fleet.machine(found.head.node) or found.head
    trial = evaluate(
        head,
        target,
        run,
        found.host.layers,
        [(_capacity(fleet, share.node, share.device), share.first, share.last) for share in found.shares],
        links_between(fleet.machines, head),
        parameters_per_byte=request.parameters / weights if weights else 0.0,
        cpu_moe=found.cpu_moe,
    )
    return replace(trial, seconds=found.seconds, prompt_seconds=found.prompt_seconds, load=found.load)


def _capacity(fleet: Fleet, node: str, device: str) -> DeviceCapacity:
    capacity = fleet.device(node, device)
    assert capacity is not None, "a placement is on devices of its fleet"
    return capacity
