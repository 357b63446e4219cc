"""Experts in the RAM of a head with a GPU that is too small for them."""

from __future__ import annotations

from dataclasses import replace

from sollold.models.footprint.footprint import Footprint, footprint
from sollold.models.footprint.run_options import Run
from sollold.models.footprint.shape import Shape
from sollold.placement.planner import choose
from sollold.placement.request import PlacementRequest
from tests.placement.fleets import GIB, MIB, cpu, fleet, footprint_with, gpu, machine, shape

REQUEST = PlacementRequest("demo:latest", "d1", parameters=400_000_000, slots=1, usual=2048)


def _moe_shape() -> Shape:
    """16 layers of 200 MiB with 160 MiB of experts, of which a token reads a sixteenth."""
    plain = shape(layer_bytes=200 * MIB)
    layers = tuple(
        replace(layer, experts=160 * MIB, largest=60 * MIB, active=50 * MIB) for layer in plain.layers
    )
    return replace(plain, layers=layers)


def _footprint(run: Run) -> Footprint:
    return footprint(_moe_shape(), run)


def test_experts_stay_in_ram_when_that_makes_the_model_fit() -> None:
    cluster = fleet(machine(cpu("a", 8 * GIB), gpu("a", 2500 * MIB), holds=True))
    choice = choose(REQUEST, cluster, _footprint)
    assert choice.candidate is not None
    plan = choice.candidate.plan(REQUEST, 16, choice.reasons)
    assert plan.host.layers == 0
    assert [(share.device, share.layers) for share in plan.shares] == [("CUDA0", 17)]
    assert 0 < plan.cpu_moe < 16
    guess = choice.footprint
    in_ram = plan.cpu_moe * 160 * MIB
    assert plan.host.weights == guess.host_weights + in_ram
    assert plan.shares[0].weights == sum(guess.weights) - in_ram
    assert plan.host.compute >= guess.host_compute(devices=1, offloaded=17) + guess.host_buffers
    assert plan.shares[0].compute >= guess.compute(0, 17, devices=1, offloaded=17) + 60 * MIB
    assert plan.shares[0].total <= 2500 * MIB < plan.shares[0].total + 160 * MIB, (
        "no more experts in RAM than necessary"
    )
    assert f"the experts of the first {plan.cpu_moe} layers on the processor" in choice.reasons[0]


def test_experts_in_ram_are_faster_than_whole_layers_in_ram() -> None:
    cluster = fleet(machine(cpu("a", 8 * GIB), gpu("a", 2500 * MIB), holds=True))
    sparse, dense = (
        choose(REQUEST, cluster, _footprint),
        choose(REQUEST, cluster, footprint_with(shape(layer_bytes=200 * MIB))),
    )
    assert sparse.candidate is not None
    assert dense.candidate is not None
    assert dense.candidate.cpu_moe == 0
    assert dense.candidate.host.layers > 0, "a dense model has no experts"
    assert sparse.candidate.seconds < dense.candidate.seconds / 2


def test_experts_stay_on_a_gpu_with_room_for_them() -> None:
    cluster = fleet(machine(cpu("a", 8 * GIB), gpu("a", 8 * GIB), holds=True))
    choice = choose(REQUEST, cluster, _footprint)
    assert choice.candidate is not None
    assert choice.candidate.cpu_moe == 0
    assert choice.candidate.host.weights == choice.footprint.host_weights


def test_a_model_does_not_fit_if_gpu_or_ram_are_too_small_for_their_part() -> None:
    cluster = fleet(machine(cpu("a", 1 * GIB), gpu("a", 1 * GIB), holds=True))
    assert choose(REQUEST, cluster, _footprint).candidate is None
