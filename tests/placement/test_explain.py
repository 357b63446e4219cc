"""The explanation of why a model does not fit, and its remedies."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from sollold.cluster.gossip.record import Record
from sollold.machine.device import Device, Kind
from sollold.models.footprint.footprint import Footprint
from sollold.models.footprint.run_options import Run
from sollold.placement.explain import Away, Busy, Shortfall, explain
from sollold.placement.inventory import Fleet, machine_of
from sollold.placement.planner import choose
from sollold.placement.request import PlacementRequest, Policy
from sollold.units import parse_bytes
from tests.placement.fleets import GIB, MIB, cpu, fleet, footprint_with, gpu, machine, shape, tight_cluster

MODEL = shape(context_train=131072)
SIZE = 16 * 50 * MIB + 2 * 20 * MIB
FOOTPRINTS = footprint_with(MODEL)
REQUEST = PlacementRequest("demo:latest", "d1", parameters=400_000_000, size=SIZE, slots=1, usual=2048)


def shortfall_of(
    request: PlacementRequest,
    cluster: Fleet,
    *busy: Busy,
    footprints: Callable[[Run], Footprint] = FOOTPRINTS,
    away: tuple[Away, ...] = (),
) -> Shortfall:
    choice = choose(request, cluster, footprints)
    assert choice.candidate is None
    return explain(request, cluster, footprints, choice, busy, away=away)


def number(pattern: str, text: str) -> str:
    """The first group of ``pattern``, found in ``text``."""
    found = re.search(pattern, text)
    assert found is not None, text
    return found[1]


def test_a_smaller_context_and_a_quantized_cache_are_named_if_each_suffices() -> None:
    cluster = fleet(machine(cpu("a", 1600 * MIB), holds=True))
    request = replace(REQUEST, context=50_000)
    first, second, *_ = shortfall_of(request, cluster).remedies
    context = int(number(r"a context of (\d+) tokens instead of 50000 \(num_ctx, or `--context`\)$", first))
    assert choose(replace(request, context=context), cluster, FOOTPRINTS).candidate is not None
    assert choose(replace(request, context=context + 1024), cluster, FOOTPRINTS).candidate is None
    assert second.startswith("a KV cache in q8_0")
    assert choose(replace(request, type_k="q8_0", type_v="q8_0"), cluster, FOOTPRINTS).candidate is not None


def test_remedies_that_help_only_together_are_named_together() -> None:
    # With keys and values in f16 not even the smallest context fits.
    model = shape(context_train=131072, output=20 * MIB, sizes=[6 * MIB] * 60)
    cluster = fleet(machine(cpu("a", 540 * MIB), holds=True))
    request = replace(REQUEST, size=400 * MIB, context=16384)
    for alone in (replace(request, context=0, usual=16384), replace(request, type_k="q8_0", type_v="q8_0")):
        assert choose(alone, cluster, footprint_with(model)).candidate is None
    first = shortfall_of(request, cluster, footprints=footprint_with(model)).remedies[0]
    context = int(number(r"a context of (\d+) tokens instead of 16384 .* with a KV cache in q8_0", first))
    both = replace(request, context=context, type_k="q8_0", type_v="q8_0")
    assert choose(both, cluster, footprint_with(model)).candidate is not None


def test_the_largest_file_that_would_fit_is_named() -> None:
    cluster = fleet(machine(cpu("a", 500 * MIB), holds=True))
    shortfall = shortfall_of(REQUEST, cluster)
    size = parse_bytes(number(r"a file of at most ([\d.]+ \w+)", " ".join(shortfall.remedies)))

    def as_file(size: float) -> Callable[[Run], Footprint]:
        share = size / SIZE
        return footprint_with(
            shape(
                sizes=[int(50 * MIB * share)] * 16,
                output=int(20 * MIB * share),
                context_train=131072,
            )
        )

    assert choose(REQUEST, cluster, as_file(size * 0.99)).candidate is not None
    assert choose(REQUEST, cluster, as_file(size * 1.06)).candidate is None


def test_no_quantization_is_named_if_none_is_small_enough() -> None:
    cluster = fleet(machine(cpu("a", 120 * MIB), holds=True))
    remedies = shortfall_of(replace(REQUEST, distributed=False), cluster).remedies
    assert not any("quantization" in remedy for remedy in remedies)


def test_remedies_are_ordered_by_their_cost() -> None:
    cluster = fleet(machine(cpu("a", 1600 * MIB), holds=True), machine(cpu("b", 100 * MIB)))
    busy = Busy("other:latest", {("a", "CPU"): 2 * GIB}, "it has 1 request")
    request = replace(REQUEST, context=50_000)
    remedies = shortfall_of(request, cluster, busy).remedies
    kinds = ("a context of", "a KV cache", "unloading other:latest", "a smaller", "another")
    assert len(remedies) == len(kinds)
    for remedy, kind in zip(remedies, kinds, strict=True):
        assert remedy.startswith(kind)


def test_absent_machines_are_named_together_if_none_suffices_alone() -> None:
    cluster = fleet(machine(cpu("a", 450 * MIB), holds=True))
    away = tuple(
        Away(machine(cpu(name, size * MIB)), f"starting {name} again")
        for name, size in (("b", 200), ("c", 350), ("d", 360))
    )
    assert "starting d again and starting c again" in shortfall_of(REQUEST, cluster, away=away).remedies
    large = Away(machine(cpu("e", 900 * MIB)), "starting e again")
    starting = [
        remedy
        for remedy in shortfall_of(REQUEST, cluster, away=(*away, large)).remedies
        if "starting" in remedy
    ]
    assert starting == ["starting e again"]
    assert not any("starting" in remedy for remedy in shortfall_of(REQUEST, cluster, away=away[:1]).remedies)


def test_two_busy_models_are_named_if_one_is_not_enough() -> None:
    cluster = fleet(machine(cpu("a", 300 * MIB), holds=True))
    held = {("a", "CPU"): 400 * MIB}
    two = (Busy("one", held, "it has 1 request"), Busy("two", held, "it is kept loaded by its keep_alive"))
    remedies = shortfall_of(replace(REQUEST, type_k="q8_0", type_v="q8_0"), cluster, *two).remedies
    assert remedies[0] == (
        "unloading one, which holds 400 MiB (it has 1 request) and "
        "two, which holds 400 MiB (it is kept loaded by its keep_alive)"
    )


def test_the_policy_is_named_if_the_model_fits_with_another_one() -> None:
    model, cluster = tight_cluster(0)
    request = replace(REQUEST, policy=Policy.EVEN, context=2048)
    assert (
        choose(replace(request, policy=Policy.FASTEST), cluster, footprint_with(model)).candidate is not None
    )
    assert (
        "the policy fastest instead of even (`--policy fastest`, or policy in the settings)"
        in shortfall_of(request, cluster, footprints=footprint_with(model)).remedies
    )


def test_released_shared_memory_counts_for_all_devices_that_share_it() -> None:
    shared_memory = machine(
        replace(cpu("a", 300 * MIB), pool="ram"), replace(gpu("a", 300 * MIB), pool="ram"), holds=True
    )
    held = {("a", "CUDA0"): 2 * GIB}
    request = replace(REQUEST, type_k="q8_0", type_v="q8_0")
    remedies = shortfall_of(
        request, fleet(shared_memory), Busy("other:latest", held, "it has 1 request")
    ).remedies
    assert remedies[0] == "unloading other:latest, which holds 2.00 GiB (it has 1 request)"


def test_a_further_machine_of_the_named_size_suffices() -> None:
    cluster = fleet(machine(cpu("a", 400 * MIB), holds=True))
    model = shape(16, 500 * MIB, 200 * MIB)
    request = replace(REQUEST, size=17 * 500 * MIB, parameters=16_000_000_000)
    (last,) = [
        remedy
        for remedy in shortfall_of(request, cluster, footprints=footprint_with(model)).remedies
        if "another machine" in remedy
    ]
    size = int(number(r"another machine with (\d+) GiB", last)) * GIB
    # What that machine would offer with the default settings.
    offered = int(size * 0.98) - 512 * MIB
    grown = fleet(*cluster.machines, machine(cpu("z", offered)))
    assert choose(request, grown, footprint_with(model)).candidate is not None


@pytest.mark.parametrize("lacking", [10, 100, 300])
@pytest.mark.parametrize("kind", ["processor", "shared", "two", "embedding"])
def test_the_missing_memory_is_what_would_suffice_and_no_more(kind: str, lacking: int) -> None:
    def with_room(room: int) -> Fleet:
        both = cpu("a", room), gpu("a", room)
        match kind:
            case "shared":
                return fleet(machine(*(replace(device, pool="ram") for device in both), holds=True))
            case "two":
                return fleet(machine(cpu("a", room), holds=True), machine(cpu("b", 300 * MIB)))
        return fleet(machine(cpu("a", room), holds=True))

    request = replace(REQUEST, embedding=kind == "embedding")
    low, high = 100 * MIB, 3 * GIB
    while high - low > MIB:
        middle = (low + high) // 2
        fits = choose(request, with_room(middle), FOOTPRINTS).candidate is not None
        low, high = (low, middle) if fits else (middle, high)
    room = high - lacking * MIB
    shortfall = shortfall_of(request, with_room(room))
    assert abs(shortfall.missing - lacking * MIB) <= 5 * MIB
    assert choose(request, with_room(room + shortfall.missing), FOOTPRINTS).candidate is not None
    assert shortfall.needed == shortfall.there + shortfall.missing
    assert shortfall.needed == shortfall.weights + shortfall.state + shortfall.buffers


def test_room_in_pieces_too_small_for_a_layer_is_named() -> None:
    model = shape(16, 200 * MIB, 100 * MIB)
    small = (machine(cpu(f"n{number}", 150 * MIB)) for number in range(8))
    cluster = fleet(machine(cpu("a", 2 * GIB), holds=True), *small)
    shortfall = shortfall_of(REQUEST, cluster, footprints=footprint_with(model))
    assert parse_bytes(number(r"room too small for a layer ([\d.]+ \w+)\)", shortfall.message)) > 512 * MIB
    grown = fleet(machine(cpu("a", 2 * GIB + shortfall.missing), holds=True), *cluster.machines[1:])
    assert choose(REQUEST, grown, footprint_with(model)).candidate is not None


def test_a_limit_on_the_number_of_machines_is_named() -> None:
    cluster = fleet(*(machine(cpu(node, 400 * MIB), holds=node == "a") for node in "abc"))
    request = replace(REQUEST, workers=1)
    shortfall = shortfall_of(request, cluster)
    assert shortfall.there == 800 * MIB
    assert 100 * MIB < shortfall.missing < 300 * MIB
    assert "at most 2 machines together" in shortfall.message
    assert shortfall.remedies[0] == "more machines together than 2 (max_workers in the settings)"
    assert choose(replace(request, workers=2), cluster, FOOTPRINTS).candidate is not None


def test_layers_on_more_devices_than_llama_cpp_takes_are_refused() -> None:
    nodes = [f"n{number}" for number in range(17)]
    cluster = fleet(*(machine(cpu(node, 2 * GIB), holds=node == "n0") for node in nodes))
    fixed = tuple((node, 1) for node in nodes)
    assert (
        "can't be placed as named (the fixed counts: they need 16 devices, and llama.cpp takes at most 15)"
        in (shortfall_of(replace(REQUEST, fixed=fixed), cluster).message)
    )
    fewer = (("n0", 2), *fixed[2:])
    assert choose(replace(REQUEST, fixed=fewer), cluster, FOOTPRINTS).candidate is not None


def test_the_reason_against_a_machine_is_that_of_its_closest_placement() -> None:
    # All layers fit on the GPU; the processor has a little too little for the rest.
    cluster = fleet(machine(cpu("a", 300 * MIB), gpu("a", 8 * GIB), holds=True))
    shortfall = shortfall_of(replace(REQUEST, embedding=True), cluster)
    assert "(host-a alone: needs 344 MiB on CPU, 300 MiB available)" in shortfall.message


def test_memory_held_back_by_a_nodes_limit_is_named_before_another_machine() -> None:
    held = replace(cpu("a", 500 * MIB), held_back=2 * GIB)
    remedies = shortfall_of(REQUEST, fleet(machine(held, holds=True), machine(cpu("b", 50 * MIB)))).remedies
    (limit,) = [index for index, remedy in enumerate(remedies) if "node.memory_limit" in remedy]
    assert "2.00 GiB of free memory on host-a" in remedies[limit]
    assert all(index > limit for index, remedy in enumerate(remedies) if "another machine" in remedy)
    # Only if that memory suffices.
    little = replace(cpu("a", 500 * MIB), held_back=100 * MIB)
    assert not any(
        "memory_limit" in remedy
        for remedy in shortfall_of(REQUEST, fleet(machine(little, holds=True))).remedies
    )


def test_memory_blocked_by_a_cgroup_is_named_if_it_suffices() -> None:
    barred = replace(cpu("a", 500 * MIB), barred=2 * GIB)
    remedies = shortfall_of(REQUEST, fleet(machine(barred, holds=True))).remedies
    (limit,) = [remedy for remedy in remedies if "MemoryMax" in remedy]
    assert limit.endswith("it blocks 2.00 GiB of free memory on host-a")
    little = replace(barred, barred=100 * MIB)
    assert not any(
        "MemoryMax" in remedy for remedy in shortfall_of(REQUEST, fleet(machine(little, holds=True))).remedies
    )


def test_held_back_memory_is_the_free_memory_above_the_limit() -> None:
    def held(limit: int, granted: int = 0, free: int = 20 * GIB) -> int:
        available = max(0, min(limit, 24 * GIB) - granted)
        device = Device("CPU", Kind.CPU, "cpu", 24 * GIB, free, limit, granted, min(available, free))
        record = Record("a", "host-a", 1, (), 1, 2, "0", devices=(device,))
        (capacity,) = machine_of(record, holds=True, spare=0.0).devices
        return capacity.held_back

    assert held(4 * GIB) == 16 * GIB
    assert held(4 * GIB, granted=3 * GIB, free=17 * GIB) == 16 * GIB
    assert held(24 * GIB) == 0
    assert held(23 * GIB) == 0


def test_memory_of_other_programs_or_of_the_reserve_is_named_if_half_of_it_suffices() -> None:
    small = cpu("a", 500 * MIB)
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"others": 2 * GIB}, "closing other programs: they use 2.00 GiB on host-a"),
        ({"reserved": 2 * GIB}, "node.gpu_reserve): it keeps 2.00 GiB of free memory on host-a"),
    )
    for change, words in cases:
        remedies = shortfall_of(REQUEST, fleet(machine(replace(small, **change), holds=True))).remedies
        assert sum(words in remedy for remedy in remedies) == 1
        less: dict[str, Any] = dict.fromkeys(change, 500 * MIB)
        little = replace(small, **less)
        assert not any(
            words[:12] in remedy
            for remedy in shortfall_of(REQUEST, fleet(machine(little, holds=True))).remedies
        )


def test_unavailable_memory_is_attributed_to_the_binding_constraint() -> None:
    def kept(limit: int, reserve: int, free: int, granted: int = 0) -> tuple[int, int, int]:
        available = max(0, min(free - reserve, limit - granted))
        device = Device("CPU", Kind.CPU, "cpu", 24 * GIB, free, limit, granted, available, reserve=reserve)
        record = Record("a", "host-a", 1, (), 1, 2, "0", devices=(device,))
        (capacity,) = machine_of(record, holds=True, spare=0.0).devices
        return capacity.held_back // GIB, capacity.reserved // GIB, capacity.others // GIB

    assert kept(24 * GIB, 0, 24 * GIB) == (0, 0, 0)
    assert kept(24 * GIB, 2 * GIB, 4 * GIB) == (
        0,
        2,
        20,
    )  # Other programs use 20, and 2 remain besides the reserve.
    assert kept(20 * GIB, 18 * GIB, 20 * GIB) == (0, 18, 4)  # The reserve is the binding constraint.
    assert kept(4 * GIB, 2 * GIB, 20 * GIB) == (14, 0, 0)  # The limit is the binding constraint.
    assert kept(24 * GIB, 2 * GIB, 10 * GIB, granted=10 * GIB) == (0, 2, 4)


def test_a_quantized_cache_is_named_for_all_wider_types() -> None:
    cluster = fleet(machine(cpu("a", 1600 * MIB), holds=True))
    types: tuple[dict[str, Any], ...] = ({"type_k": "f32", "type_v": "f32"}, {"type_v": "bf16"})
    for wide in types:
        remedies = shortfall_of(replace(REQUEST, context=50_000, **wide), cluster).remedies
        assert any(remedy.startswith("a KV cache in q8_0 (`--kv q8_0`") for remedy in remedies), wide
    remedies = shortfall_of(replace(REQUEST, context=131_000, type_k="q8_0", type_v="q5_1"), cluster).remedies
    assert not any("KV cache" in remedy for remedy in remedies)


def test_the_closest_placement_is_that_of_the_smallest_context() -> None:
    model = shape(context_train=131072, sizes=[300 * MIB] * 2, output=20 * MIB)
    machines = [machine(cpu(name, 290 * MIB), holds=name == "a") for name in "abc"]
    request = replace(REQUEST, size=620 * MIB, usual=65536, slots=4)
    shortfall = shortfall_of(request, fleet(*machines), footprints=footprint_with(model))
    assert "with 2048 tokens of context for one request" in shortfall.message
    needed = parse_bytes(number(r"a alone: needs ([\d.]+ \w+)", shortfall.message))
    assert needed < 1.1 * shortfall.needed, shortfall.message
