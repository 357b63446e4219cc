"""What a user is told when a model does not fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from sollold.models.footprint import Footprint
from sollold.models.run import Run
from sollold.placement.fleet import Fleet
from sollold.placement.planner import choose
from sollold.placement.shortfall import Busy, Shortfall, explain
from sollold.placement.wish import Policy, Wish
from sollold.units import parse_bytes
from tests.placement.fleets import GIB, MIB, cpu, fleet, gpu, machine, prints, shape, tight_cluster

MODEL = shape(context_train=131072)
SIZE = 16 * 50 * MIB + 2 * 20 * MIB
PRINTS = prints(MODEL)
WISH = Wish("demo:latest", "d1", parameters=400_000_000, size=SIZE, slots=1, usual=2048)


def told(
    wish: Wish,
    on: Fleet,
    *busy: Busy,
    of: Callable[[Run], Footprint] = PRINTS,
) -> Shortfall:
    choice = choose(wish, on, of)
    assert choice.draft is None
    return explain(wish, on, of, choice, busy)


def number(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    assert found is not None, text
    return found[1]


def test_a_smaller_context_or_smaller_keys_are_each_named_where_each_suffices() -> None:
    on = fleet(machine(cpu("a", 1600 * MIB), holds=True))
    wish = replace(WISH, context=50_000)
    first, second, *_ = told(wish, on).remedies
    context = int(number(r"a context of (\d+) tokens instead of 50000", first))
    assert choose(replace(wish, context=context), on, PRINTS).draft is not None
    assert choose(replace(wish, context=context + 1024), on, PRINTS).draft is None
    assert second.startswith("keys and values in q8_0")
    assert choose(replace(wish, type_k="q8_0", type_v="q8_0"), on, PRINTS).draft is not None


def test_what_helps_only_together_is_named_together() -> None:
    # Not even the least context fits with keys and values in f16.
    model = shape(context_train=131072, output=20 * MIB, sizes=[6 * MIB] * 60)
    on = fleet(machine(cpu("a", 540 * MIB), holds=True))
    wish = replace(WISH, size=400 * MIB, context=16384)
    for alone in (replace(wish, context=0, usual=16384), replace(wish, type_k="q8_0", type_v="q8_0")):
        assert choose(alone, on, prints(model)).draft is None
    first = told(wish, on, of=prints(model)).remedies[0]
    context = int(number(r"a context of (\d+) tokens instead of 16384 with keys and values in q8_0", first))
    both = replace(wish, context=context, type_k="q8_0", type_v="q8_0")
    assert choose(both, on, prints(model)).draft is not None


def test_the_largest_file_that_would_fit_is_named() -> None:
    on = fleet(machine(cpu("a", 500 * MIB), holds=True))
    shortfall = told(WISH, on)
    size = parse_bytes(number(r"a file of at most ([\d.]+ \w+)", " ".join(shortfall.remedies)))

    def as_file(size: float) -> Callable[[Run], Footprint]:
        share = size / SIZE
        return prints(
            shape(
                sizes=[int(50 * MIB * share)] * 16,
                output=int(20 * MIB * share),
                context_train=131072,
            )
        )

    assert choose(WISH, on, as_file(size * 0.99)).draft is not None
    assert choose(WISH, on, as_file(size * 1.06)).draft is None


def test_no_quantization_is_named_where_none_is_small_enough() -> None:
    on = fleet(machine(cpu("a", 120 * MIB), holds=True))
    remedies = told(replace(WISH, distributed=False), on).remedies
    assert not any("quantization" in remedy for remedy in remedies)


def test_the_ways_out_come_in_the_order_of_what_they_cost() -> None:
    on = fleet(machine(cpu("a", 1600 * MIB), holds=True), machine(cpu("b", 100 * MIB)))
    busy = Busy("x-1", "other:latest", {("a", "CPU"): 2 * GIB}, "1 request is in it")
    wish = replace(WISH, context=50_000)
    remedies = told(wish, on, busy).remedies
    kinds = ("a context of", "keys and", "other:latest giving back its 2.00 GiB", "a smaller", "another")
    assert len(remedies) == len(kinds)
    for remedy, kind in zip(remedies, kinds, strict=True):
        assert remedy.startswith(kind)


def test_two_in_use_are_named_where_one_is_not_enough() -> None:
    on = fleet(machine(cpu("a", 300 * MIB), holds=True))
    held = {("a", "CPU"): 400 * MIB}
    two = (Busy("x-1", "one", held, "1 request is in it"), Busy("x-2", "two", held, "1 request is in it"))
    remedies = told(replace(WISH, type_k="q8_0", type_v="q8_0"), on, *two).remedies
    assert remedies[0] == "one and two giving back their 800 MiB (1 request is in it)"


def test_the_policy_is_named_where_it_is_what_keeps_the_model_out() -> None:
    model, on = tight_cluster(0)
    wish = replace(WISH, policy=Policy.EVEN, context=2048)
    assert choose(replace(wish, policy=Policy.FASTEST), on, prints(model)).draft is not None
    assert "the policy fastest instead of even" in told(wish, on, of=prints(model)).remedies


def test_what_is_given_back_of_a_shared_memory_is_there_for_all_who_share_it() -> None:
    one = machine(
        replace(cpu("a", 300 * MIB), pool="ram"), replace(gpu("a", 300 * MIB), pool="ram"), holds=True
    )
    held = {("a", "CUDA0"): 2 * GIB}
    wish = replace(WISH, type_k="q8_0", type_v="q8_0")
    remedies = told(wish, fleet(one), Busy("x-1", "other:latest", held, "1 request is in it")).remedies
    assert remedies[0] == "other:latest giving back its 2.00 GiB (1 request is in it)"


def test_a_machine_that_is_named_would_do() -> None:
    on = fleet(machine(cpu("a", 400 * MIB), holds=True))
    model = shape(16, 500 * MIB, 200 * MIB)
    wish = replace(WISH, size=17 * 500 * MIB, parameters=16_000_000_000)
    (last,) = [one for one in told(wish, on, of=prints(model)).remedies if "another machine" in one]
    size = int(number(r"another machine with (\d+) GiB", last)) * GIB
    grown = fleet(*on.machines, machine(cpu("z", size)))
    assert choose(wish, grown, prints(model)).draft is not None
