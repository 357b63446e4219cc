"""What a user is told when a model does not fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

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
PRINTS = footprint_with(MODEL)
WISH = PlacementRequest("demo:latest", "d1", parameters=400_000_000, size=SIZE, slots=1, usual=2048)


def told(
    request: PlacementRequest,
    on: Fleet,
    *busy: Busy,
    of: Callable[[Run], Footprint] = PRINTS,
    away: tuple[Away, ...] = (),
) -> Shortfall:
    choice = choose(request, on, of)
    assert choice.candidate is None
    return explain(request, on, of, choice, busy, away=away)


def number(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    assert found is not None, text
    return found[1]


def test_a_smaller_context_or_smaller_keys_are_each_named_where_each_suffices() -> None:
    on = fleet(machine(cpu("a", 1600 * MIB), holds=True))
    request = replace(WISH, context=50_000)
    first, second, *_ = told(request, on).remedies
    context = int(number(r"a context of (\d+) tokens instead of 50000", first))
    assert choose(replace(request, context=context), on, PRINTS).candidate is not None
    assert choose(replace(request, context=context + 1024), on, PRINTS).candidate is None
    assert second.startswith("a KV cache in q8_0")
    assert choose(replace(request, type_k="q8_0", type_v="q8_0"), on, PRINTS).candidate is not None


def test_what_helps_only_together_is_named_together() -> None:
    # Not even the least context fits with keys and values in f16.
    model = shape(context_train=131072, output=20 * MIB, sizes=[6 * MIB] * 60)
    on = fleet(machine(cpu("a", 540 * MIB), holds=True))
    request = replace(WISH, size=400 * MIB, context=16384)
    for alone in (replace(request, context=0, usual=16384), replace(request, type_k="q8_0", type_v="q8_0")):
        assert choose(alone, on, footprint_with(model)).candidate is None
    first = told(request, on, of=footprint_with(model)).remedies[0]
    context = int(number(r"a context of (\d+) tokens instead of 16384 with a KV cache in q8_0", first))
    both = replace(request, context=context, type_k="q8_0", type_v="q8_0")
    assert choose(both, on, footprint_with(model)).candidate is not None


def test_the_largest_file_that_would_fit_is_named() -> None:
    on = fleet(machine(cpu("a", 500 * MIB), holds=True))
    shortfall = told(WISH, on)
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

    assert choose(WISH, on, as_file(size * 0.99)).candidate is not None
    assert choose(WISH, on, as_file(size * 1.06)).candidate is None


def test_no_quantization_is_named_where_none_is_small_enough() -> None:
    on = fleet(machine(cpu("a", 120 * MIB), holds=True))
    remedies = told(replace(WISH, distributed=False), on).remedies
    assert not any("quantization" in remedy for remedy in remedies)


def test_the_ways_out_come_in_the_order_of_what_they_cost() -> None:
    on = fleet(machine(cpu("a", 1600 * MIB), holds=True), machine(cpu("b", 100 * MIB)))
    busy = Busy("x-1", "other:latest", {("a", "CPU"): 2 * GIB}, "it has 1 request")
    request = replace(WISH, context=50_000)
    remedies = told(request, on, busy).remedies
    kinds = ("a context of", "a KV cache", "other:latest releasing its 2.00 GiB", "a smaller", "another")
    assert len(remedies) == len(kinds)
    for remedy, kind in zip(remedies, kinds, strict=True):
        assert remedy.startswith(kind)


def test_machines_that_take_no_part_are_named_together_where_none_would_suffice_alone() -> None:
    on = fleet(machine(cpu("a", 450 * MIB), holds=True))
    away = tuple(
        Away(machine(cpu(name, size * MIB)), f"starting {name} again")
        for name, size in (("b", 200), ("c", 350), ("d", 360))
    )
    assert "starting d again and starting c again" in told(WISH, on, away=away).remedies
    large = Away(machine(cpu("e", 900 * MIB)), "starting e again")
    starting = [one for one in told(WISH, on, away=(*away, large)).remedies if "starting" in one]
    assert starting == ["starting e again"]
    assert not any("starting" in one for one in told(WISH, on, away=away[:1]).remedies)


def test_two_in_use_are_named_where_one_is_not_enough() -> None:
    on = fleet(machine(cpu("a", 300 * MIB), holds=True))
    held = {("a", "CPU"): 400 * MIB}
    two = (Busy("x-1", "one", held, "it has 1 request"), Busy("x-2", "two", held, "it has 1 request"))
    remedies = told(replace(WISH, type_k="q8_0", type_v="q8_0"), on, *two).remedies
    assert remedies[0] == "one and two releasing their 800 MiB (it has 1 request)"


def test_the_policy_is_named_where_it_is_what_keeps_the_model_out() -> None:
    model, on = tight_cluster(0)
    request = replace(WISH, policy=Policy.EVEN, context=2048)
    assert choose(replace(request, policy=Policy.FASTEST), on, footprint_with(model)).candidate is not None
    assert "the policy fastest instead of even" in told(request, on, of=footprint_with(model)).remedies


def test_what_is_given_back_of_a_shared_memory_is_there_for_all_who_share_it() -> None:
    one = machine(
        replace(cpu("a", 300 * MIB), pool="ram"), replace(gpu("a", 300 * MIB), pool="ram"), holds=True
    )
    held = {("a", "CUDA0"): 2 * GIB}
    request = replace(WISH, type_k="q8_0", type_v="q8_0")
    remedies = told(request, fleet(one), Busy("x-1", "other:latest", held, "it has 1 request")).remedies
    assert remedies[0] == "other:latest releasing its 2.00 GiB (it has 1 request)"


def test_a_machine_that_is_named_would_do() -> None:
    on = fleet(machine(cpu("a", 400 * MIB), holds=True))
    model = shape(16, 500 * MIB, 200 * MIB)
    request = replace(WISH, size=17 * 500 * MIB, parameters=16_000_000_000)
    (last,) = [
        one for one in told(request, on, of=footprint_with(model)).remedies if "another machine" in one
    ]
    size = int(number(r"another machine with (\d+) GiB", last)) * GIB
    grown = fleet(*on.machines, machine(cpu("z", size)))
    assert choose(request, grown, footprint_with(model)).candidate is not None


def test_memory_that_the_nodes_own_limits_hold_back_is_named_before_another_machine() -> None:
    held = replace(cpu("a", 500 * MIB), held_back=2 * GIB)
    remedies = told(WISH, fleet(machine(held, holds=True), machine(cpu("b", 50 * MIB)))).remedies
    (limit,) = [index for index, one in enumerate(remedies) if "node.memory_limit" in one]
    assert "2.00 GiB of free memory on host-a" in remedies[limit]
    assert all(index > limit for index, one in enumerate(remedies) if "another machine" in one)
    # Only where it would do.
    little = replace(cpu("a", 500 * MIB), held_back=100 * MIB)
    assert not any("memory_limit" in one for one in told(WISH, fleet(machine(little, holds=True))).remedies)


def test_memory_that_a_control_group_bars_is_named_where_it_would_do() -> None:
    barred = replace(cpu("a", 500 * MIB), barred=2 * GIB)
    remedies = told(WISH, fleet(machine(barred, holds=True))).remedies
    (limit,) = [one for one in remedies if "MemoryMax" in one]
    assert limit.endswith("it blocks 2.00 GiB of free memory on host-a")
    little = replace(barred, barred=100 * MIB)
    assert not any("MemoryMax" in one for one in told(WISH, fleet(machine(little, holds=True))).remedies)


def test_what_a_limit_holds_back_is_what_is_free_beyond_it() -> None:
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


def test_what_other_programs_use_and_a_reserve_keeps_is_named_where_half_of_it_would_do() -> None:
    small = cpu("a", 500 * MIB)
    for change, words in (
        ({"others": 2 * GIB}, "closing other programs: they use 2.00 GiB on host-a"),
        ({"reserved": 2 * GIB}, "node.gpu_reserve): it keeps 2.00 GiB of free memory on host-a"),
    ):
        remedies = told(WISH, fleet(machine(replace(small, **change), holds=True))).remedies
        assert sum(words in one for one in remedies) == 1
        little = replace(small, **dict.fromkeys(change, 500 * MIB))
        assert not any(words[:12] in one for one in told(WISH, fleet(machine(little, holds=True))).remedies)


def test_whose_free_memory_it_is_follows_from_what_binds() -> None:
    def kept(limit: int, reserve: int, free: int, granted: int = 0) -> tuple[int, int, int]:
        available = max(0, min(free - reserve, limit - granted))
        device = Device("CPU", Kind.CPU, "cpu", 24 * GIB, free, limit, granted, available, reserve=reserve)
        record = Record("a", "host-a", 1, (), 1, 2, "0", devices=(device,))
        (capacity,) = machine_of(record, holds=True, spare=0.0).devices
        return tuple(size // GIB for size in (capacity.held_back, capacity.reserved, capacity.others))  # type: ignore[return-value]

    assert kept(24 * GIB, 0, 24 * GIB) == (0, 0, 0)
    assert kept(24 * GIB, 2 * GIB, 4 * GIB) == (0, 2, 20)  # Others have 20, models 2 beside the reserve.
    assert kept(20 * GIB, 18 * GIB, 20 * GIB) == (0, 18, 4)  # The reserve binds, and not the limit.
    assert kept(4 * GIB, 2 * GIB, 20 * GIB) == (14, 0, 0)  # The limit binds: what others have would not help.
    assert kept(24 * GIB, 2 * GIB, 10 * GIB, granted=10 * GIB) == (0, 2, 4)


def test_smaller_keys_and_values_are_named_for_all_types_that_are_wider() -> None:
    on = fleet(machine(cpu("a", 1600 * MIB), holds=True))
    for wide in ({"type_k": "f32", "type_v": "f32"}, {"type_v": "bf16"}):
        remedies = told(replace(WISH, context=50_000, **wide), on).remedies
        assert any(one.startswith("a KV cache in q8_0 (`--kv q8_0`") for one in remedies), wide
    remedies = told(replace(WISH, context=131_000, type_k="q8_0", type_v="q5_1"), on).remedies
    assert not any("KV cache" in one for one in remedies)
