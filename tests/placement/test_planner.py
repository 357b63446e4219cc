"""Where models go."""

from __future__ import annotations

import random
import statistics
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sollold.cluster.gossip.record import Record
from sollold.machine.device import Device, Kind
from sollold.placement import context
from sollold.placement.inventory import DeviceCapacity, Fleet, LeftOut, Link, Machine, machine_of
from sollold.placement.plan import Plan
from sollold.placement.planner import PlacementChoice, choose
from sollold.placement.request import PlacementRequest, Policy
from tests.placement.brute import best_over_several
from tests.placement.fleets import (
    GIB,
    MIB,
    cpu,
    fleet,
    footprint_with,
    gpu,
    machine,
    random_fleet,
    shape,
    tight_cluster,
)

SMALL = shape()
WISH = PlacementRequest("demo:latest", "d1", parameters=400_000_000, slots=1, usual=2048)


def plan_of(choice: PlacementChoice) -> Plan:
    assert choice.candidate is not None, choice.alternatives
    return choice.candidate.plan(WISH, choice.footprint.layers, choice.reasons)


def check(plan: Plan, on: Fleet) -> None:
    """The plan is whole and no device has to hold more than it can."""
    total = plan.layers + 1
    at = plan.host.last
    for share in plan.shares:
        assert share.first == at
        assert share.layers > 0
        at = share.last
    assert at == total
    assert sum(plan.tensor_split) == plan.gpu_layers == total - plan.host.layers
    assert len(plan.shares) <= 15
    for node, devices in plan.bytes_by_owner().items():
        there = on.machine(node)
        assert there is not None
        for device, size in devices.items():
            capacity = there.device_named(device)
            assert capacity is not None
            assert size <= capacity.room


def test_a_model_that_fits_one_machine_is_not_spread() -> None:
    on = fleet(
        machine(cpu("a", 400 * MIB)),
        machine(cpu("b", 4 * GIB), holds=True),
        machine(cpu("c", 64 * GIB, 400e9)),
    )
    choice = choose(WISH, on, footprint_with(SMALL))
    plan = plan_of(choice)
    check(plan, on)
    assert plan.head == "b"
    assert plan.shares == ()
    assert plan.host.last == 17
    assert plan.gpu_layers == 0
    assert "host-b alone" in choice.reasons[0]


def test_the_gpu_goes_before_the_processor() -> None:
    on = fleet(machine(cpu("a", 8 * GIB), gpu("a", 8 * GIB), holds=True))
    plan = plan_of(choose(WISH, on, footprint_with(SMALL)))
    check(plan, on)
    assert [share.device for share in plan.shares] == ["CUDA0"]
    assert plan.gpu_layers == 17


def test_several_gpus_of_one_machine() -> None:
    on = fleet(machine(cpu("a", 8 * GIB), gpu("a", 900 * MIB), gpu("a", 900 * MIB, number=1), holds=True))
    plan = plan_of(choose(WISH, on, footprint_with(SMALL)))
    check(plan, on)
    assert sorted(share.device for share in plan.shares) == ["CUDA0", "CUDA1"]
    assert plan.host.layers == 0


def test_a_gpu_that_is_too_small_leaves_the_first_layers_to_the_processor() -> None:
    on = fleet(machine(cpu("a", 8 * GIB), gpu("a", 800 * MIB), holds=True))
    plan = plan_of(choose(WISH, on, footprint_with(SMALL)))
    check(plan, on)
    assert 0 < plan.host.layers < 17
    assert plan.shares[0].first == plan.host.last


def test_three_machines_of_400_mib_hold_a_model_of_800() -> None:
    on = fleet(
        machine(cpu("a", 400 * MIB), holds=True), machine(cpu("b", 400 * MIB)), machine(cpu("c", 400 * MIB))
    )
    choice = choose(replace(WISH, slots=4, usual=8192), on, footprint_with(SMALL))
    plan = plan_of(choice)
    check(plan, on)
    assert {share.node for share in plan.shares} | {plan.head} == {"a", "b", "c"}
    assert any("alone" in one.what and one.tokens_per_second == 0 for one in choice.alternatives)


def test_a_plan_says_which_links_it_only_assumes() -> None:
    def reasons(*measured: str) -> str:
        links = tuple((node, Link(0.0003, 1e8)) for node in measured)
        on = fleet(
            machine(cpu("a", 400 * MIB), holds=True, links=links),
            machine(cpu("b", 400 * MIB)),
            machine(cpu("c", 400 * MIB)),
        )
        return " ".join(choose(WISH, on, footprint_with(SMALL)).reasons)

    assert "assumed" not in reasons("b", "c")
    assert "between host-a and host-c has not been measured: 1 Gb/s is assumed" in reasons("b")
    assert "between host-a and host-b, host-c has" in reasons()


def test_a_local_device_ends_the_line() -> None:
    on = fleet(
        machine(cpu("a", 8 * GIB), gpu("a", 900 * MIB), holds=True),
        machine(cpu("b", 100 * MIB), gpu("b", 900 * MIB)),
    )
    request = replace(WISH, always=True)
    plan = plan_of(choose(request, on, footprint_with(SMALL)))
    check(plan, on)
    assert plan.shares[-1].node == "a"
    assert plan.shares[0].node == "b"


def test_spread_only_where_the_settings_allow() -> None:
    on = fleet(machine(cpu("a", 600 * MIB), holds=True), machine(cpu("b", 900 * MIB)))
    assert choose(replace(WISH, distributed=False), on, footprint_with(SMALL)).candidate is None
    assert choose(WISH, on, footprint_with(SMALL)).candidate is not None


def test_only_a_machine_with_the_file_is_the_head() -> None:
    on = fleet(machine(cpu("a", 64 * GIB)), machine(cpu("b", 64 * GIB)))
    assert choose(WISH, on, footprint_with(SMALL)).candidate is None


def test_quick_machines_without_ram_do_not_hide_one_that_can_be_the_head() -> None:
    quick = [machine(gpu(f"q{i}", 600 * MIB), cpu(f"q{i}", 60 * MIB), holds=True) for i in range(4)]
    slow = machine(cpu("slow", 500 * MIB), holds=True)
    on = fleet(*quick, slow)
    plan = plan_of(choose(WISH, on, footprint_with(SMALL)))
    check(plan, on)
    assert plan.head == "slow"


def test_few_requests_at_a_time_go_before_many_machines() -> None:
    model = shape(context_train=65536)
    on = fleet(machine(cpu("a", 1700 * MIB), holds=True), machine(cpu("b", 4 * GIB)))
    choice = choose(replace(WISH, slots=16, usual=32768), on, footprint_with(model))
    plan = plan_of(choice)
    assert len(plan.shares) == 0
    assert plan.run.slots < 16
    assert plan.run.context // plan.run.slots == 32768


def test_the_context_shrinks_as_far_as_it_must_and_no_further() -> None:
    model = shape(context_train=131072)
    on = fleet(machine(cpu("a", 1100 * MIB), holds=True))
    choice = choose(replace(WISH, usual=131072), on, footprint_with(model))
    plan = plan_of(choice)
    check(plan, on)
    assert 2048 <= plan.run.context < 131072
    larger = replace(WISH, context=plan.run.context + 1024)
    assert choose(larger, on, footprint_with(model)).candidate is None
    assert any("no room" in reason for reason in choice.reasons)


def test_a_context_that_was_named_is_given_or_refused() -> None:
    on = fleet(machine(cpu("a", 1100 * MIB), holds=True))
    model = shape(context_train=131072)
    assert choose(replace(WISH, context=131072), on, footprint_with(model)).candidate is None
    plan = plan_of(choose(replace(WISH, context=4096), on, footprint_with(model)))
    assert plan.run.context == 4096


def test_no_context_beyond_the_training() -> None:
    on = fleet(machine(cpu("a", 64 * GIB), holds=True))
    choice = choose(replace(WISH, context=100_000), on, footprint_with(shape(context_train=4096)))
    assert plan_of(choice).run.context == 4096
    assert any("trained with 4096" in reason for reason in choice.reasons)


def test_a_split_over_gpus_goes_before_one_slow_processor() -> None:
    model = shape(80, 500 * MIB, 1 * GIB, n_embd=8192, n_vocab=128000)
    on = fleet(
        machine(cpu("a", 128 * GIB), gpu("a", 24 * GIB, 900e9), holds=True),
        machine(cpu("b", 16 * GIB), gpu("b", 24 * GIB, 900e9)),
    )
    choice = choose(WISH, on, footprint_with(model))
    plan = plan_of(choice)
    check(plan, on)
    assert {share.device for share in plan.shares} == {"CUDA0"}
    assert any(one.what == "host-a alone" and one.tokens_per_second > 0 for one in choice.alternatives)


def test_fixed_counts_are_kept() -> None:
    on = fleet(machine(cpu("a", 2 * GIB), holds=True), machine(cpu("b", 2 * GIB)), machine(cpu("c", 2 * GIB)))
    plan = plan_of(choose(replace(WISH, fixed=(("b", 5), ("c", 4), ("a", 8))), on, footprint_with(SMALL)))
    check(plan, on)
    assert [(share.node, share.layers) for share in plan.shares] == [("b", 5), ("c", 4), ("a", 8)]
    plan = plan_of(choose(replace(WISH, fixed=(("a", 6), ("b", 10))), on, footprint_with(SMALL)))
    check(plan, on)
    assert plan.host.layers == 6
    assert plan.tensor_split == (11,)
    wrong = choose(replace(WISH, fixed=(("a", 6), ("b", 3))), on, footprint_with(SMALL))
    assert wrong.candidate is None
    assert "sum to 9" in wrong.alternatives[0].reason


def test_a_node_that_can_not_take_its_fixed_layers_is_told_by_its_name() -> None:
    on = replace(
        fleet(machine(cpu("a", 2 * GIB), holds=True)), left_out=(LeftOut("b", "host-b", "it drains"),)
    )
    wrong = choose(replace(WISH, fixed=(("a", 6), ("b", 11))), on, footprint_with(SMALL))
    assert wrong.alternatives[0].reason == "host-b is not available"


@pytest.mark.parametrize("policy", [Policy.EVEN, Policy.MEMORY_AWARE, Policy.SPREAD])
def test_the_other_policies_hold_the_model(policy: Policy) -> None:
    on = fleet(
        machine(cpu("a", 500 * MIB), holds=True), machine(cpu("b", 700 * MIB)), machine(cpu("c", 900 * MIB))
    )
    plan = plan_of(choose(replace(WISH, policy=policy), on, footprint_with(SMALL)))
    check(plan, on)
    counts = {share.node: share.layers for share in plan.shares}
    if policy is Policy.EVEN:
        assert max(counts.values()) - min(counts.values()) <= 2
    if policy is Policy.SPREAD:
        assert set(counts) == {"a", "b", "c"}
        assert counts["a"] <= counts["b"] <= counts["c"]


@pytest.mark.parametrize("policy", [Policy.EVEN, Policy.MEMORY_AWARE, Policy.SPREAD])
def test_processors_beside_a_gpu_take_part_where_the_gpus_are_too_small(policy: Policy) -> None:
    on = fleet(
        machine(cpu("a", 600 * MIB), gpu("a", 600 * MIB), holds=True),
        machine(cpu("b", 600 * MIB), gpu("b", 600 * MIB)),
    )
    plan = plan_of(choose(replace(WISH, policy=policy), on, footprint_with(SMALL)))
    check(plan, on)
    assert {(share.node, share.device) for share in plan.shares} >= {("a", "CUDA0"), ("b", "CUDA0")}
    assert any(share.device == "CPU" for share in plan.shares)
    roomy = fleet(
        machine(cpu("a", 8 * GIB), gpu("a", 800 * MIB), holds=True),
        machine(cpu("b", 8 * GIB), gpu("b", 800 * MIB)),
    )
    plan = plan_of(choose(replace(WISH, policy=policy, always=True), roomy, footprint_with(SMALL)))
    assert all(share.device == "CUDA0" for share in plan.shares), "and nowhere else"


def test_a_shared_memory_counts_once() -> None:
    record_devices = (
        Device("CPU", Kind.CPU, "cpu", 2 * GIB, GIB, 2 * GIB, 0, GIB, pool="ram", bandwidth=20e9),
        Device("Vulkan0", Kind.GPU, "gpu", 2 * GIB, GIB, 2 * GIB, 0, GIB, pool="ram", bandwidth=40e9),
    )
    from sollold.cluster.gossip.record import Record

    record = Record("a", "host-a", 1, ("127.0.0.1",), 1, 2, "0", devices=record_devices)
    one = machine_of(record, holds=True, spare=0.0)
    assert one.room == GIB
    big = shape(16, 90 * MIB)
    assert choose(WISH, Fleet((one,)), footprint_with(big)).candidate is None
    plan = plan_of(choose(WISH, Fleet((one,)), footprint_with(shape(16, 40 * MIB))))
    assert [share.device for share in plan.shares] == ["Vulkan0"]


def test_spare_room_is_left() -> None:
    from sollold.cluster.gossip.record import Record

    device = Device("CPU", Kind.CPU, "cpu", 100 * GIB, 50 * GIB, 100 * GIB, 0, 400 * MIB)
    record = Record("a", "host-a", 1, (), 1, 2, "0", devices=(device,), links=(("b", 0.001, 1e8),))
    one = machine_of(record, holds=False, spare=0.05)
    assert one.devices[0].room == 380 * MIB
    assert one.links == (("b", Link(0.001, 1e8)),)
    assert machine_of(record, holds=False, spare=0.0, taken={"CPU": 100 * MIB}).room == 300 * MIB
    assert machine_of(record, holds=False, spare=0.0, freed={"CPU": 100 * MIB}).room == 500 * MIB


def test_what_a_record_says_of_kept_tensors_counts_for_their_model() -> None:
    from sollold.cluster.gossip.record import Record

    record = Record("a", "host-a", 1, (), 1, 2, "0", cached=(("ab" * 8, 5 * GIB),))
    assert machine_of(record, holds=False, spare=0.0, digest="ab" * 32).cached == 5 * GIB
    assert machine_of(record, holds=False, spare=0.0, digest="cd" * 32).cached == 0
    assert machine_of(record, holds=False, spare=0.0).cached == 0


def test_a_copy_of_the_file_counts_as_kept() -> None:
    from sollold.cluster.gossip.record import Record

    record = Record("a", "host-a", 1, (), 1, 2, "0", cached=(("ab" * 8, 1 * GIB),))
    assert machine_of(record, holds=True, spare=0.0, digest="ab" * 32, copy=5 * GIB).cached == 5 * GIB
    assert machine_of(record, holds=True, spare=0.0, digest="ab" * 32).cached == 1 * GIB


def test_better_than_the_split_by_memory_on_200_clusters() -> None:
    gains = []
    for seed in range(200):
        dice = random.Random(seed)
        layers = dice.choice([24, 32, 48])
        model = shape(layers, 200 * MIB, 300 * MIB, n_embd=4096, n_vocab=128000)
        on = random_fleet(seed, layers * 200 * MIB, dice.randint(3, 5))
        request = replace(WISH, always=True)
        fastest = choose(request, on, footprint_with(model))
        default = choose(replace(request, policy=Policy.SPREAD), on, footprint_with(model))
        if fastest.candidate is None:
            assert default.candidate is None, seed
            continue
        check(plan_of(fastest), on)
        if default.candidate is not None:
            check(plan_of(default), on)
            same = default.candidate.run == fastest.candidate.run
            assert not same or fastest.candidate.seconds <= default.candidate.seconds * 1.01, seed
            gains.append(default.candidate.seconds / fastest.candidate.seconds)
    assert len(gains) > 80
    assert statistics.median(gains) > 1.2


def test_within_a_hundredth_of_the_best_of_all_placements_on_200_tight_clusters() -> None:
    gains = []
    for seed in range(200):
        model, on = tight_cluster(seed)
        request = replace(WISH, always=True, context=2048)
        choice = choose(request, on, footprint_with(model))
        full, _ = context.runs_to_try(request, model.context_train)
        tried = (best_over_several(on, footprint_with(model)(run), run) for run in full)
        best = next((one for one in tried if one is not None), None)
        if best is None:
            assert choice.candidate is None, seed
            continue
        assert choice.candidate is not None, seed
        check(plan_of(choice), on)
        assert choice.candidate.run == best.run, seed
        assert choice.candidate.seconds <= best.seconds * 1.01, seed
        default = choose(replace(request, policy=Policy.SPREAD), on, footprint_with(model))
        if default.candidate is not None and default.candidate.run == best.run:
            gains.append(default.candidate.seconds / choice.candidate.seconds)
    assert len(gains) > 40
    assert statistics.median(gains) > 1.2


def test_the_processor_of_a_head_with_a_gpu_may_end_the_line() -> None:
    slow = Link(0.0002, 20e6)
    links = (("b", slow),)
    on = fleet(
        machine(cpu("a", 1000 * MIB, 80e9), gpu("a", 500 * MIB), holds=True, links=links),
        machine(cpu("b", 100 * MIB), gpu("b", 1100 * MIB)),
    )
    model = shape(output=250 * MIB, n_vocab=256000)
    plan = plan_of(choose(replace(WISH, always=True, context=2048), on, footprint_with(model)))
    check(plan, on)
    assert (plan.shares[-1].node, plan.shares[-1].device) == ("a", "CPU")


def test_a_machine_elsewhere_that_holds_all_of_it_needs_no_other() -> None:
    # Alone it pipelines no batches, so that it holds what it could not hold with another.
    model = shape(8, 100 * MIB, n_embd=4096)
    run = context.run_with(replace(WISH, context=2048), 2048, 1)
    needed = footprint_with(model)(run)
    size = sum(needed.weights) + sum(needed.state) + needed.compute(0, 9, devices=1, offloaded=9)
    on = fleet(
        machine(cpu("a", 150 * MIB), holds=True), machine(gpu("b", size + 300 * MIB), cpu("b", 10 * MIB))
    )
    plan = plan_of(choose(replace(WISH, context=2048), on, footprint_with(model)))
    check(plan, on)
    assert [(share.node, share.device) for share in plan.shares] == [("b", "CUDA0")]
    assert choose(replace(WISH, context=2048, workers=0), on, footprint_with(model)).candidate is None


def test_machines_that_have_kept_the_tensors_go_before_others_that_are_as_fast() -> None:
    def on(*kept: str, slow: float = 20e9) -> Fleet:
        head = machine(cpu("a", 150 * MIB), holds=True)
        rest = [machine(cpu(node, 700 * MIB, slow if node in kept else 20e9)) for node in "bcdefg"]
        return fleet(head, *(replace(one, cached=400 * MIB * (one.node in kept)) for one in rest))

    def nodes(plan: Plan) -> set[str]:
        return {share.node for share in plan.shares} - {"a"}

    plain = plan_of(choose(WISH, on(), footprint_with(SMALL)))
    for kept in ("fg", "de", "ce"):
        plan = plan_of(choose(WISH, on(*kept), footprint_with(SMALL)))
        assert nodes(plan) == set(kept)
        assert plan.tokens_per_second == pytest.approx(plain.tokens_per_second)
        assert plan.load_seconds < plain.load_seconds * 0.5
    # One that is a little slower is worth it, one that is clearly slower is not.
    assert nodes(plan_of(choose(WISH, on("f", "g", slow=19.8e9), footprint_with(SMALL)))) == {"f", "g"}
    assert not nodes(plan_of(choose(WISH, on("f", "g", slow=18e9), footprint_with(SMALL)))) & {"f", "g"}


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    machines=st.integers(1, 7),
    layers=st.integers(1, 40),
    policy=st.sampled_from(list(Policy)),
    active=st.sampled_from([1.0, 0.1]),
)
def test_every_plan_respects_memory(
    seed: int, machines: int, layers: int, policy: Policy, active: float
) -> None:
    dice = random.Random(seed)
    sizes = [int(dice.uniform(5, 60) * MIB) for _ in range(layers)]
    model = shape(sizes=sizes, active=active, output=dice.choice([1, 60, 200]) * MIB)
    on = random_fleet(seed, sum(sizes) + 400 * MIB, machines)
    choice = choose(
        replace(WISH, policy=policy, slots=dice.choice([1, 4]), usual=4096), on, footprint_with(model)
    )
    if choice.candidate is not None:
        check(plan_of(choice), on)
        assert choice.candidate.seconds > 0
        assert choice.candidate.load > 0


def test_no_more_than_fifteen_devices_and_so_many_workers() -> None:
    machines: list[Machine] = [machine(cpu("n0", 300 * MIB), holds=True)]
    machines += [machine(cpu(f"n{i}", 160 * MIB)) for i in range(1, 40)]
    model = shape(32, 20 * MIB, 10 * MIB, n_embd=256)
    on = Fleet(tuple(machines))
    check(plan_of(choose(WISH, on, footprint_with(model))), on)
    assert choose(replace(WISH, workers=2), on, footprint_with(model)).candidate is None


PLAIN = "10.0.0.9:50052"


def plain(node: str, room: int, device: str = PLAIN) -> DeviceCapacity:
    return DeviceCapacity(node, device, Kind.EXTERNAL, room)


def test_a_plain_worker_takes_what_no_machine_can() -> None:
    on = fleet(machine(cpu("a", 500 * MIB), plain("a", 2 * GIB), holds=True))
    choice = choose(WISH, on, footprint_with(SMALL))
    plan = plan_of(choice)
    check(plan, on)
    assert PLAIN in [share.device for share in plan.shares]
    assert f"the external worker {PLAIN}" in choice.reasons[0]
    assert choice.reasons[0].startswith("No machine that has the file can hold it alone: ")
    assert choice.reasons[0].endswith("in total.")
    assert "alone" not in choice.reasons[0].split(":")[1]
    none = choose(replace(WISH, distributed=False), on, footprint_with(SMALL))
    assert none.candidate is None, "a model that may not be spread is not put on one"


def test_a_machine_that_holds_a_model_alone_uses_no_plain_worker() -> None:
    on = fleet(machine(cpu("a", 4 * GIB), plain("a", 64 * GIB), holds=True))
    assert plan_of(choose(WISH, on, footprint_with(SMALL))).shares == ()


def test_a_plain_worker_counts_as_a_machine_of_its_own() -> None:
    on = fleet(machine(cpu("a", 500 * MIB), plain("a", 400 * MIB), plain("a", 400 * MIB, "pc:1"), holds=True))
    both = plan_of(choose(WISH, on, footprint_with(SMALL)))
    assert {share.device for share in both.shares} >= {PLAIN, "pc:1"}
    assert choose(replace(WISH, workers=1), on, footprint_with(SMALL)).candidate is None


def test_of_a_plain_worker_that_is_given_back_all_is_there() -> None:
    held = Device(PLAIN, Kind.EXTERNAL, "w", GIB, GIB, GIB, 100 * MIB, 0)
    record = Record("a", "a", 1, (), 1, 2, "0", devices=(held,))
    rooms = [
        machine_of(record, holds=False, spare=0.0, freed=freed, taken=taken).devices[0].room
        for freed, taken in (({}, {}), ({PLAIN: 100 * MIB}, {}), ({PLAIN: 100 * MIB}, {PLAIN: MIB}))
    ]
    assert rooms == [0, GIB, 0]
