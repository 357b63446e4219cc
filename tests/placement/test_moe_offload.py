"""Experts in the RAM of a head whose GPU is too small for them."""

from __future__ import annotations

from dataclasses import replace

from sollold.models.footprint.footprint import Footprint, footprint
from sollold.models.footprint.run_options import Run
from sollold.models.footprint.shape import Shape
from sollold.placement.planner import choose
from sollold.placement.request import PlacementRequest
from tests.placement.fleets import GIB, MIB, cpu, fleet, footprint_with, gpu, machine, shape

WISH = PlacementRequest("demo:latest", "d1", parameters=400_000_000, slots=1, usual=2048)


def _mixture() -> Shape:
    """16 layers of 200 MiB, of which 160 are experts that are read to a sixteenth."""
    plain = shape(layer_bytes=200 * MIB)
    layers = tuple(
        replace(layer, experts=160 * MIB, largest=60 * MIB, active=50 * MIB) for layer in plain.layers
    )
    return replace(plain, layers=layers)


def _print(run: Run) -> Footprint:
    return footprint(_mixture(), run)


def test_experts_stay_in_ram_when_that_makes_the_model_fit() -> None:
    on = fleet(machine(cpu("a", 8 * GIB), gpu("a", 2500 * MIB), holds=True))
    choice = choose(WISH, on, _print)
    assert choice.candidate is not None
    plan = choice.candidate.plan(WISH, 16, choice.reasons)
    assert plan.host.layers == 0
    assert [(share.device, share.layers) for share in plan.shares] == [("CUDA0", 17)]
    assert 0 < plan.cpu_moe < 16
    guess = choice.footprint
    kept = plan.cpu_moe * 160 * MIB
    assert plan.host.weights == guess.host_weights + kept
    assert plan.shares[0].weights == sum(guess.weights) - kept
    assert plan.host.compute >= guess.host_compute(devices=1, offloaded=17) + guess.host_buffers
    assert plan.shares[0].compute >= guess.compute(0, 17, devices=1, offloaded=17) + 60 * MIB
    assert plan.shares[0].total <= 2500 * MIB < plan.shares[0].total + 160 * MIB, "as few as must be"
    assert f"the experts of the first {plan.cpu_moe} layers on the processor" in choice.reasons[0]


def test_it_is_quicker_than_whole_layers_on_the_processor() -> None:
    on = fleet(machine(cpu("a", 8 * GIB), gpu("a", 2500 * MIB), holds=True))
    kept, dense = choose(WISH, on, _print), choose(WISH, on, footprint_with(shape(layer_bytes=200 * MIB)))
    assert kept.candidate is not None
    assert dense.candidate is not None
    assert dense.candidate.cpu_moe == 0
    assert dense.candidate.host.layers > 0, "a dense model has no experts to keep"
    assert kept.candidate.seconds < dense.candidate.seconds / 2


def test_experts_stay_on_the_gpu_that_has_room_for_them() -> None:
    on = fleet(machine(cpu("a", 8 * GIB), gpu("a", 8 * GIB), holds=True))
    choice = choose(WISH, on, _print)
    assert choice.candidate is not None
    assert choice.candidate.cpu_moe == 0
    assert choice.candidate.host.weights == choice.footprint.host_weights


def test_where_neither_holds_its_part_it_does_not_fit() -> None:
    on = fleet(machine(cpu("a", 1 * GIB), gpu("a", 1 * GIB), holds=True))
    assert choose(WISH, on, _print).candidate is None
