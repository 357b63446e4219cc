"""Exact memory requirements of placements."""

from __future__ import annotations

from dataclasses import replace

from sollold.models.footprint.footprint import footprint
from sollold.models.footprint.run_options import Run
from sollold.models.footprint.shape import Shape
from sollold.placement import cost_model
from sollold.placement.evaluate import Candidate, Hold, evaluate
from sollold.placement.inventory import Link
from sollold.placement.request import PlacementRequest
from tests.placement.fleets import GIB, MIB, cpu, gpu, machine, shape

REQUEST = PlacementRequest("demo:latest", "d1")
RUN = Run(context=8192, slots=2, flash="on", checkpoints=3)


def _windowed(model: Shape) -> Shape:
    """The model with windowed attention in all layers."""
    layers = tuple(replace(layer, window=True) for layer in model.layers)
    return replace(model, architecture="gemma3", window=2048, layers=layers)


def _spread(model: Shape, bandwidth: float) -> Candidate:
    head, other = machine(cpu("a", 8 * GIB), holds=True), machine(cpu("b", 8 * GIB))
    holds = [(other.devices[0], 0, 8), (head.devices[0], 8, 17)]
    links = {"b": Link(0.0005, bandwidth), "a": cost_model.LOOPBACK}
    return evaluate(head, footprint(model, RUN), RUN, 0, holds, links, cost_model.uncorrected)


def test_no_checkpoints_over_a_link_that_is_too_slow_for_them() -> None:
    model = _windowed(shape())
    near, far = _spread(model, 1e9), _spread(model, 10e6)
    assert near.plan(REQUEST, 16, ()).run.checkpoints == footprint(model, RUN).checkpoints > 0
    assert far.plan(REQUEST, 16, ()).run.checkpoints == 0
    assert near.host.total - far.host.total == footprint(model, RUN).checkpoint_bytes > 0
    assert near.run == far.run == RUN, "the candidate keeps the run of the search"


def test_without_checkpoints_the_head_still_has_room_for_the_largest_tensor() -> None:
    model = replace(_windowed(shape()), largest_tensor=600 * MIB)
    footprint_of = footprint(model, RUN)
    far = _spread(model, 10e6)
    process = 30 * MIB
    assert footprint_of.checkpoint_bytes > 0
    assert far.host.state + far.host.compute + far.host.overhead - process == 600 * MIB


def test_the_projector_is_counted_on_its_device() -> None:
    head = machine(cpu("a", 8 * GIB), gpu("a", 8 * GIB), holds=True)
    other = machine(gpu("b", 8 * GIB))
    plain = shape()
    model = replace(plain, projector=100 * MIB)
    far, near = (other.devices[0], 0, 8), (head.devices[1], 8, 17)

    def added(holds: list[Hold]) -> list[int]:
        candidates = [
            evaluate(
                head,
                footprint(variant, RUN),
                RUN,
                17 - sum(last - first for _, first, last in holds),
                holds,
                {},
                cost_model.uncorrected,
            )
            for variant in (plain, model)
        ]
        before, after = ((candidate.host, *candidate.shares) for candidate in candidates)
        return [b.weights - a.weights for a, b in zip(before, after, strict=True)]

    assert added([far, near]) == [0, 0, 100 * MIB], "on the head's own GPU, which is not the first device"
    assert added([(other.devices[0], 0, 17)]) == [100 * MIB, 0], "never on another machine's GPU"
    assert added([]) == [100 * MIB]


def test_a_worker_needs_room_only_for_the_largest_tensor_of_its_own_layers() -> None:
    head, other = machine(cpu("a", 8 * GIB), holds=True), machine(cpu("b", 8 * GIB))
    plain = shape()
    layers = tuple(
        replace(layer, largest=(90 if index == 3 else 10) * MIB) for index, layer in enumerate(plain.layers)
    )
    model = replace(plain, layers=layers, largest_tensor=500 * MIB, largest_output=300 * MIB)
    run = Run(context=256)
    holds = [(other.devices[0], 0, 4), (other.devices[0], 4, 8), (head.devices[0], 8, 17)]
    candidate = evaluate(head, footprint(model, run), run, 0, holds, {}, cost_model.uncorrected)
    first, middle, last = candidate.shares
    process = other.devices[0].overhead
    assert first.state + first.compute + first.overhead - process == 90 * MIB
    assert middle.overhead == process, "its state and compute buffer are larger than its largest tensor"
    assert last.state + last.compute + last.overhead - process == 300 * MIB


def test_devices_that_share_memory_keep_their_own_limits() -> None:
    def candidate_with(cpu_room: int, gpu_room: int) -> Candidate:
        shared = replace(cpu("a", cpu_room), pool="node"), replace(gpu("a", gpu_room), pool="node")
        head = machine(*shared, holds=True)
        holds = [(head.devices[1], 0, 17)]
        return evaluate(head, footprint(shape(), RUN), RUN, 0, holds, {}, cost_model.uncorrected)

    (short,) = candidate_with(8 * GIB, 900 * MIB).short
    assert (short.device, short.room) == ("CUDA0", 900 * MIB)
    assert candidate_with(8 * GIB, 8 * GIB).short == ()
    assert candidate_with(300 * MIB, 8 * GIB).short == (), "the CPU's limit does not apply to the GPU"
    on_gpu, on_host = (
        candidate_with(8 * GIB, 8 * GIB).shares[0].total,
        candidate_with(8 * GIB, 8 * GIB).host.total,
    )
    (short,) = candidate_with(on_gpu + on_host - 1, on_gpu + on_host - 1).short
    assert short.needed == on_gpu + on_host
