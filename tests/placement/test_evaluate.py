"""What a placement takes, worked out to the byte."""

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

WISH = PlacementRequest("demo:latest", "d1")
RUN = Run(context=8192, slots=2, flash="on", checkpoints=3)


def _windowed(model: Shape) -> Shape:
    """The model with a window over all its layers."""
    layers = tuple(replace(layer, window=True) for layer in model.layers)
    return replace(model, architecture="gemma3", window=2048, layers=layers)


def _spread(model: Shape, bandwidth: float) -> Candidate:
    head, other = machine(cpu("a", 8 * GIB), holds=True), machine(cpu("b", 8 * GIB))
    holds = [(other.devices[0], 0, 8), (head.devices[0], 8, 17)]
    links = {"b": Link(0.0005, bandwidth), "a": cost_model.LOOPBACK}
    return evaluate(head, footprint(model, RUN), RUN, 0, holds, links, cost_model.uncorrected)


def test_no_checkpoints_where_each_would_hold_up_the_prompt() -> None:
    model = _windowed(shape())
    near, far = _spread(model, 1e9), _spread(model, 10e6)
    assert near.plan(WISH, 16, ()).run.checkpoints == footprint(model, RUN).checkpoints > 0
    assert far.plan(WISH, 16, ()).run.checkpoints == 0
    assert near.host.total - far.host.total == footprint(model, RUN).checkpoint_bytes > 0
    assert near.run == far.run == RUN, "the search knows its runs by what it asked for"


def test_without_checkpoints_the_largest_tensor_still_finds_room_while_the_head_loads() -> None:
    model = replace(_windowed(shape()), largest_tensor=600 * MIB)
    footprint_of = footprint(model, RUN)
    far = _spread(model, 10e6)
    process = 30 * MIB
    assert footprint_of.checkpoint_bytes > 0
    assert far.host.state + far.host.compute + far.host.overhead - process == 600 * MIB


def test_the_projector_is_counted_where_it_computes() -> None:
    head = machine(cpu("a", 8 * GIB), gpu("a", 8 * GIB), holds=True)
    other = machine(gpu("b", 8 * GIB))
    plain = shape()
    model = replace(plain, projector=100 * MIB)
    far, near = (other.devices[0], 0, 8), (head.devices[1], 8, 17)

    def added(holds: list[Hold]) -> list[int]:
        made = [
            evaluate(
                head,
                footprint(one, RUN),
                RUN,
                17 - sum(last - first for _, first, last in holds),
                holds,
                {},
                cost_model.uncorrected,
            )
            for one in (plain, model)
        ]
        before, after = ((one.host, *one.shares) for one in made)
        return [b.weights - a.weights for a, b in zip(before, after, strict=True)]

    assert added([far, near]) == [0, 0, 100 * MIB], "the head's own GPU, though it is not the first device"
    assert added([(other.devices[0], 0, 17)]) == [100 * MIB, 0], "never another machine's"
    assert added([]) == [100 * MIB]


def test_a_worker_is_sent_no_more_than_the_tensors_of_its_own_layers() -> None:
    head, other = machine(cpu("a", 8 * GIB), holds=True), machine(cpu("b", 8 * GIB))
    plain = shape()
    layers = tuple(
        replace(layer, largest=(90 if index == 3 else 10) * MIB) for index, layer in enumerate(plain.layers)
    )
    model = replace(plain, layers=layers, largest_tensor=500 * MIB, largest_output=300 * MIB)
    run = Run(context=256)
    holds = [(other.devices[0], 0, 4), (other.devices[0], 4, 8), (head.devices[0], 8, 17)]
    made = evaluate(head, footprint(model, run), run, 0, holds, {}, cost_model.uncorrected)
    begins, middle, ends = made.shares
    process = other.devices[0].overhead
    assert begins.state + begins.compute + begins.overhead - process == 90 * MIB
    assert middle.overhead == process, "it needs more for what it computes than while it loads"
    assert ends.state + ends.compute + ends.overhead - process == 300 * MIB


def test_of_a_shared_memory_each_device_takes_no_more_than_its_own_part() -> None:
    def made(processor: int, gpu_room: int) -> Candidate:
        shared = replace(cpu("a", processor), pool="node"), replace(gpu("a", gpu_room), pool="node")
        head = machine(*shared, holds=True)
        holds = [(head.devices[1], 0, 17)]
        return evaluate(head, footprint(shape(), RUN), RUN, 0, holds, {}, cost_model.uncorrected)

    (short,) = made(8 * GIB, 900 * MIB).short
    assert (short.device, short.room) == ("CUDA0", 900 * MIB)
    assert made(8 * GIB, 8 * GIB).short == ()
    assert made(300 * MIB, 8 * GIB).short == (), "the limit of one is not that of the other"
    on_gpu, on_host = made(8 * GIB, 8 * GIB).shares[0].total, made(8 * GIB, 8 * GIB).host.total
    (short,) = made(on_gpu + on_host - 1, on_gpu + on_host - 1).short
    assert short.needed == on_gpu + on_host
